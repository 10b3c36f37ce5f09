"""Projection, per-head RMSNorm and rotary embedding of keys in one pass."""
