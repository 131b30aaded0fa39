"""What several factorization methods have in common."""
