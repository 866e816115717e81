"""Metrics: distances between sets of images, and losses per range of timesteps."""
