"""y = a x + b (x U_s) U_s^T, the subspace s chosen for each sequence."""
