"""What pruning methods are put together with: masks, and moves of the weights that stay."""
