"""A study of two estimators of similarity, on a problem with a known answer and on real maps."""
