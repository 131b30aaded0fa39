"""Buffers that old checkpoints hold and today's architectures compute: no weights, and not missed."""

import re
from collections.abc import Sequence

COMPUTED = re.compile(
    r"(rotary\w*\.((original_)?inv_freq|(cos|sin)_cached)"
    r"|(^|\.)(position_ids|token_type_ids|relative_position_index)"
    r"|(attn|attention)\.(masked_bias|causal_mask)"
    r"|(^|\.)embed_positions\.(weights|_float_tensor)"
    r"|(^|\.)(encoder|decoder)\.version)$"
)
MASK = re.compile(r"(attn|attention)\.bias$")
"""A causal mask if it is [1, 1, time, time]; else a bias."""


def is_old_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor on disk that the model has none for is such a buffer.

    transformers itself leaves out only those that a class of its own lists.

    >>> is_old_buffer("h.0.attn.bias", [1, 1, 8, 8]), is_old_buffer("h.0.attn.bias", [8])
    (True, False)
    """
    return bool(COMPUTED.search(name)) or (
        bool(MASK.search(name)) and len(shape) == 4 and tuple(shape[:2]) == (1, 1)
    )
