"""Token perplexity and bits per byte of a causal language model, over non-overlapping blocks.

Each text is cut into blocks of the maximum length; a block's first token is context only, and is
the last token of the block before. So every token but a text's first is predicted exactly once,
from at most max_length - 1 tokens before it in its block.
"""

import math
from collections.abc import Iterator

from fishertool.calibration import Example


def perplexity_metrics(nll: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """From the summed negative log-likelihood in nats of the scored tokens and the bytes they spell."""
    loss = nll / tokens
    perplexity = math.inf if loss > 700 else math.exp(loss)
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": nll / math.log(2) / max(text_bytes, 1),
    }


def blocks(example: Example, max_length: int) -> Iterator[Example]:
    """One text as blocks; the text's bytes stay with the first. A single token predicts nothing."""
    step, text_bytes = max_length - 1, example.text_bytes
    for start in range(0, example.length - 1, step):
        stop = start + max_length
        inputs = {name: ids[start:stop] for name, ids in example.inputs.items()}
        yield Example(inputs, None, text_bytes)
        text_bytes = 0
