"""What a merge method is.

A pure function in a file of its own name, called for one run of rows of a tensor after the other:

    def name(models, [weights], [base], [fishers], [activations], [kroneckers], [generators],
             [whole], *, setting=default) -> Tensor

models       k tensors of one shape, float32 (float64 where stored so); `tuple[Tensor, Tensor]`
             where k is two, of which mergekit calls the first `base_model`
weights      k numbers; a method that does not name this input takes no `--weights`
base         the common ancestor's tensor; a method that names this input takes `--base`
fishers      k `Fisher`s; a method that names this input needs `--fisher`
activations  k second moments of a linear layer's input, [in, in]; the piece is then the whole
             weight, [out, in]
kroneckers   k `Kronecker`s; the piece is then the whole weight, [out, in]
generators   k `torch.Generator`s, seeded by the tensor, the model and the piece
whole        what the file's `whole` found out about the whole tensor

It returns a tensor of that shape and dtype, and writes into none of its arguments. A piece is
`[rows, width]` with the last dimension whole, and so is a vector, `[elements]`; no piece is empty.

A method that must know more of a tensor than one piece has a second function in its file, a
generator that makes passes over all pieces, in which a long vector comes in several:

    def whole(weights, elements, *, setting=default) -> Passes[Found]:
        total = yield lambda models, base: ...     # of one piece; the sum over pieces comes back
        return Found(...)

Where the method names `fishers`, its passes are given those of the piece as well:
`lambda models, base, fishers: ...`.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from math import isfinite
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

PerModel = float | Sequence[float]
"""A setting that may differ from model to model."""

T = TypeVar("T")
Pass = Callable[..., Any]
"""What one pass takes from a piece, of models, base and maybe Fishers: what + can sum up over the
pieces, as tensors or lists."""
Passes = Generator[Pass, Any, T]


class Fisher(NamedTuple):
    """One model's diagonal Fisher of one piece, with what of the whole a formula needs."""

    values: Tensor
    """As `models[i]`, non-negative."""
    tensor_mean: float
    """Mean over the whole tensor that the piece is cut from."""
    mean: float
    """Mean over all merged weights."""
    l2: float
    """L2 norm over all merged weights."""


class Kronecker(NamedTuple):
    """One model's Kronecker factors of one linear layer: F is about gradient kron activation."""

    activation: Tensor
    """Second moment of a token's input, [in, in]."""
    gradient: Tensor
    """Second moment of the gradient at a token's output, times the tokens of an example,
    [out, out]."""
    mean: float
    """Mean of the diagonal of this F over all merged weights that have factors."""
    l2: float
    """L2 norm of that diagonal."""


def per_model(setting: PerModel, models: int) -> list[float]:
    """One number a model. Raises ValueError for another count than one, or than the models'.

    >>> per_model(0.5, 2), per_model([0.1, 0.2], 2)
    ([0.5, 0.5], [0.1, 0.2])
    """
    if isinstance(setting, int | float):
        return [float(setting)] * models
    if len(setting) != models:
        raise ValueError(f"{len(setting)} numbers for {models} models")
    return [float(number) for number in setting]


def fractions(setting: PerModel, models: int, name: str) -> list[float]:
    """One number a model, each from 0 to 1. Raises ValueError with the setting's name for others.

    >>> fractions(0.5, 2, "density")
    [0.5, 0.5]
    """
    found = per_model(setting, models)
    for number in found:
        if not 0 <= number <= 1:
            raise ValueError(f"{name} {number} is not from 0 to 1")
    return found


def total_of(weights: Sequence[float]) -> float:
    """Their sum, to divide by; 0 where they cancel but for rounding.

    Raises OverflowError for one that is no number.

    >>> total_of([0.1, 0.2, -0.3]), total_of([0.5, -0.25])
    (0.0, 0.25)
    """
    total = sum(weights)
    if not isfinite(total):
        raise OverflowError(f"the sum of weights {weights} is no number")
    return total if abs(total) > 1e-9 * sum(map(abs, weights)) else 0.0


def refuse_negative(**settings: PerModel) -> None:
    """Raises ValueError with the name of a setting that is below zero, or NaN.

    >>> refuse_negative(damping=0.5, weight=[1, 0])
    """
    for name, setting in settings.items():
        for number in [setting] if isinstance(setting, int | float) else setting:
            if not number >= 0:
                raise ValueError(f"{name} {number} is negative")


def make_passes(passes: Passes[T], pieces: Callable[[], Iterable[tuple[Any, ...]]]) -> T:
    """Run a `whole`: for every pass the sum over all pieces, in their order.

    pieces  the arguments of a pass, for each piece: (models, base) or (models, base, fishers)
    """
    try:
        one = next(passes)
        while True:
            total: Any = None
            for piece in pieces():
                found = one(*piece)
                total = found if total is None else total + found
            assert total is not None, "a tensor has at least one piece"
            one = passes.send(total)
    except StopIteration as end:
        result: T = end.value
        return result
