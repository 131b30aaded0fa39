"""Fisher statistics from per-example gradients. Pure: models and tensors in, tensors out."""
