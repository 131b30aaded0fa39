"""Whether gradients formed by rules are those of plain autograd, logits those without padding, and
examples apart in what layers read."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fishertool.fisher.gradients import Gradient, dtype_of, rows_of

T = TypeVar("T")
TOLERANCE = 0.05
"""Of a tensor's root mean square; a wrong rule is off by more, bfloat16 by less."""


class Agreement:
    """Compares each example's gradients with multiples of autograd's; `differing` has the names.

    exact   name -> autograd's gradient, for those that have one
    named   name -> a tensor of its shape, for all
    factors  what each example's gradient is, in terms of `exact`
    """

    def __init__(
        self, exact: Mapping[str, Tensor], named: Mapping[str, Tensor], factors: Sequence[float]
    ):
        self._exact = exact
        self._named = named
        self._factors = factors
        self._own = {name: _rms(value) for name, value in exact.items()}
        count = sum(value.numel() for value in exact.values())
        squares = (self._own[name] ** 2 * value.numel() for name, value in exact.items())
        self._all = math.sqrt(sum(squares) / max(count, 1))
        self.differing = {name for name, value in exact.items() if bool(value.any())}
        """At first, all that have a gradient: one that is never handed on is missed, however small."""

    def consume(self, name: str, parts: Sequence[Gradient]) -> None:
        self.differing.discard(name)
        named, exact, dtype = self._named[name], self._exact.get(name), dtype_of(parts)
        for n, factor in enumerate(self._factors):
            if exact is None:
                error = torch.zeros(rows_of(named), dtype=dtype, device=named.device)
            else:
                error = (exact.reshape(rows_of(named)) * -factor).to(dtype)
            for part in parts:
                part.add_rows(error, n, 0)
            # Beside the tensor's own gradient, or beside all of them where it has next to none, or
            # none but rounding: a key's bias has no influence at all.
            rounding = 0.0 if exact is None else 8 * torch.finfo(exact.dtype).eps
            bound = TOLERANCE * (self._own.get(name, 0.0) + max(1e-3, rounding) * self._all)
            if not _rms(error) <= bound * abs(factor):
                self.differing.add(name)


class FirstDimensions:
    """Of what the calls of each parameter read and gave, with one example and then with two.

    shared  embeddings -> whether their ids are as many for two, that is, have no example dimension
    """

    def __init__(self) -> None:
        self.shared: dict[int, bool] = {}
        self._sizes: tuple[dict[int, list[int]], ...] = (defaultdict(list), defaultdict(list))

    def see(self, examples: int, keys: Sequence[int], reads: Tensor | None, output: Tensor) -> None:
        """Raises RuntimeError if an embedding's ids are shared in one call and not in another."""
        one, two = self._sizes
        sizes = [len(each) for each in (reads, output) if each is not None and each.dim()]
        for key in keys:
            if examples == 1:
                one[key] += sizes
                continue
            if reads is not None and reads.dim() and not reads.is_floating_point():
                shared = one[key][len(two[key]) :][:1] == sizes[:1]
                if self.shared.setdefault(key, shared) != shared:
                    raise RuntimeError("ids of examples, and then of none")
                if shared:
                    sizes = [2 * size for size in sizes]
            two[key] += sizes

    @property
    def told_apart(self) -> bool:
        """Whether two examples were twice as much everywhere."""
        one, two = self._sizes
        return all(sizes == [2 * size for size in one[key]] for key, sizes in two.items())


def with_calls(forward: Callable[[], Tensor]) -> tuple[Tensor, dict[nn.Module, set[int]]]:
    """What it gives, and of each module that it called the sizes of its outputs' first dimension."""
    called: dict[nn.Module, set[int]] = defaultdict(set)

    def see(module: nn.Module, args: Any, output: Any) -> None:
        called[module].update(output.shape[:1] if isinstance(output, Tensor) else ())

    handle = register_module_forward_hook(see)
    try:
        return forward(), called
    finally:
        handle.remove()


def picks(
    model: nn.Module,
    layers: Collection[nn.Module],
    called: Mapping[nn.Module, Collection[int]],
    rows: int,
) -> bool:
    """Whether the modules of a list with such layers are called as experts: some of them and others
    not, or with other than the batch's rows in front. Each is given the tokens picked for it, however
    many of an example these are."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            children = [one for one in module.children() if any(True for _ in one.parameters())]
            sizes = [called[child] for child in children if child in called]
            some = 0 < len(sizes) < len(children)
            of_tokens = len(sizes) > 1 and any({*one} - {rows} for one in sizes)
            if (some or of_tokens) and any(one in layers for one in module.modules()):
                return True
    return False


def equal_but_for_rounding(alone: Tensor, padded: Tensor) -> bool:
    """Whether logits are those that the same example has with more columns behind its own. Either
    may have columns for padding of a decoder."""
    common = tuple(map(slice, map(min, alone.shape, padded.shape)))
    alone = alone[common]
    error = alone - padded[common]
    error, size = (one.double().nan_to_num(0, 0, 0).norm() for one in (error, alone))
    return bool(error <= torch.finfo(alone.dtype).eps ** 0.5 * size)


def sees_padding(run: Callable[[Sequence[T]], Tensor], short: T, longer: T) -> bool:
    """Whether an example gets other outputs beside a longer one than alone. `run` gives those of
    examples that are padded to one length, [example, ...]."""
    return not equal_but_for_rounding(run([short]), run([short, longer])[:1])


def _rms(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(tensor, dtype=wide))
    return norm / math.sqrt(max(tensor.numel(), 1))
