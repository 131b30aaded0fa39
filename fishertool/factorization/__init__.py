"""Low-rank factorization methods, a file each, and the ranks they are cut at; pure functions."""
