"""Pruning methods: pure functions of weights and statistics -> saliencies. One method a file."""
