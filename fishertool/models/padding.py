"""Whether padding matters to a model: some have no mask for it, or read the last column."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fishertool.calibration import Example
from fishertool.calibration.data import probes
from fishertool.fisher.agreement import equal_but_for_rounding

ALONE = "padding changes the model's outputs: examples went one at a time, whatever --batch-size"


@torch.no_grad()
def padding_matters(
    run: Callable[[Sequence[Example]], Tensor], examples: Sequence[Example]
) -> bool:
    """Whether a short example gets other outputs beside a longer one than alone.

    `run` gives the outputs of examples that are padded to one length, [example, ...].
    """
    short, longer = probes(examples)
    if longer is None:
        return False
    return not equal_but_for_rounding(run([short]), run([short, longer])[:1])
