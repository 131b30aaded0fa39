"""The output of a layer or function whose gradient is waited for."""

from collections.abc import Callable, Mapping

from torch import Tensor

from fishertool.fisher.views import Part

Form = Callable[[Tensor, int], Mapping[int, Part]]
"""(gradient of an output, examples) -> the gradient of each parameter, by id."""


class Expected:
    """What a call's rule needs once the gradient comes."""

    def __init__(self, what: str, reads: Tensor | None, numbers: dict[int, int], form: Form):
        self.what = what
        self.reads = reads
        self.version = 0 if reads is None else reads._version
        self.numbers = numbers
        """By parameter, how many calls came before it."""
        self.form: Form | None = form

    @property
    def is_stale(self) -> bool:
        """Whether what it reads was changed in place since."""
        return self.reads is not None and self.reads._version != self.version


def made(output: Tensor) -> Tensor:
    """What an output is but another shape of, as a linear layer with bias gives it.

    A later in-place change of a view puts the view's own hooks out of the graph.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not base.requires_grad:
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output
