"""Diffusion models: loading, conditioning, noise schedules, sampling, and what torch needs to compute them."""
