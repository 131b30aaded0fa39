"""What several merge methods are made of."""
