"""Evaluation: feature nets, distances between sets of images, losses per range, scores with their protocol, reports."""
