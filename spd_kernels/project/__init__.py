"""y = a x + b (x U) U^T, for one tensor or for keys and values together."""
