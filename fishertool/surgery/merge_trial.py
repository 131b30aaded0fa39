"""Whether a method takes its weights and settings, found out before anything is read."""

from collections.abc import Sequence
from typing import Any

import torch

from fishertool.errors import UsageError
from fishertool.merging.method import Fisher, Kronecker, make_passes
from fishertool.registry import Method

SIDE = 2


def try_settings(
    method: Method, weights: Sequence[float], settings: dict[str, Any], with_base: bool
) -> None:
    """Merge matrices of two by two. Raises UsageError with what the method has against it."""
    count = len(weights)
    models = [torch.full((SIDE, SIDE), 1.0 + number) for number in range(count)]
    base = torch.zeros(SIDE, SIDE) if with_base else None
    eye = torch.eye(SIDE)
    examples: dict[str, Any] = {
        "weights": weights,
        "base": base,
        "fishers": [Fisher(torch.ones(SIDE, SIDE), 1.0, 1.0, 1.0)] * count,
        "activations": [eye] * count,
        "kroneckers": [Kronecker(eye, eye, 1.0, 1.0)] * count,
        "generators": [torch.Generator().manual_seed(number) for number in range(count)],
    }
    given = {name: examples[name] for name in method.inputs if name in examples}
    piece = (models, base, examples["fishers"]) if "fishers" in given else (models, base)
    try:
        if method.whole is not None:
            passes = method.passes(weights, SIDE * SIDE, settings)
            given["whole"] = make_passes(passes, lambda: [piece])
        method.function(models, **given, **settings)
    except ZeroDivisionError as error:
        raise UsageError(
            f"method {method.name}: weights that sum to 0 cannot be normalized"
        ) from error
    except ValueError as error:
        raise UsageError(f"method {method.name}: {error}") from error
    except (OverflowError, RuntimeError) as error:
        if "overflow" not in str(error) and not isinstance(error, OverflowError):
            raise
        raise UsageError(
            f"method {method.name}: its weights or settings are too large to be computed with"
        ) from error
