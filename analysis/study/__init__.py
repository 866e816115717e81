"""Which estimator of similarity is to be believed: a problem whose truth is `known`, two `estimators` on it, their `plots`."""
