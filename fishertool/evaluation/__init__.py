"""Metrics, a file each, and the loop that measures them."""
