"""Bytes on disk: files written whole or not at all, safetensors headers and weights, where a model lies, hashes."""
