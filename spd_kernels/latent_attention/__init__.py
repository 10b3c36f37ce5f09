"""Attention of a short block of queries over keys and values that are kept as latents."""
