"""Which merge is best: candidates and how to choose among them."""
