"""Merge recipes: what is merged from what, by which method, with which settings where."""
