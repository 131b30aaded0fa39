"""Transformations of whole checkpoints: a plan made from headers, then carried out piece by piece."""
