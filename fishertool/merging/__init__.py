"""Merge methods: pure functions of models, weights and Fishers. One method a file."""
