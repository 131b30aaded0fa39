"""Buffers that old checkpoints hold and today's architectures compute: no weights, and not missed."""

import re
from collections.abc import Sequence

ROTARY, ATTENTION = re.compile(r"rotary\w*$"), re.compile(r"(attn|attention)$")
POSITIONS, CODER = re.compile(r"(^|\.)embed_positions$"), re.compile(r"(^|\.)(en|de)coder$")
ANYWHERE = re.compile("")
COMPUTED = {
    "inv_freq": ROTARY,
    "original_inv_freq": ROTARY,
    "cos_cached": ROTARY,
    "sin_cached": ROTARY,
    "position_ids": ANYWHERE,
    "token_type_ids": ANYWHERE,
    "relative_position_index": ANYWHERE,
    "masked_bias": ATTENTION,
    "causal_mask": ATTENTION,
    "weights": POSITIONS,
    "_float_tensor": POSITIONS,
    "version": CODER,
    "bias": ATTENTION,
}
"""Of which modules each is a buffer. A bias is one, the causal mask, if it is [1, 1, time, time]."""


def is_old_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor on disk that the model has none for is such a buffer.

    transformers itself leaves out only those that a class of its own lists.

    >>> is_old_buffer("h.0.attn.bias", [1, 1, 8, 8]), is_old_buffer("h.0.attn.bias", [8])
    (True, False)
    """
    module, _, last = name.rpartition(".")
    if last not in COMPUTED or not COMPUTED[last].search(module):
        return False
    return last != "bias" or (len(shape) == 4 and tuple(shape[:2]) == (1, 1))
