"""Safetensors checkpoints: lazy in, bounded and atomic out. The only code that touches their bytes."""
