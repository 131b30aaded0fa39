"""Whether the examples of a batch are apart in what layers read and give: by first dimensions."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


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
