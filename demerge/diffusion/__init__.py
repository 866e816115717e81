"""Diffusion models: loading, conditioning, noise schedules, sampling, numerics."""
