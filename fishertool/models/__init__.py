"""Models, tokenizers and tasks of transformers; names on disk and names in memory."""
