"""Bytes on disk: atomic writes, safetensors, weights, where a model lies, hashes."""
