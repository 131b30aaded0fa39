"""A model read by another tokenizer's ids: row i of its embeddings is that of output token i."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fishertool.checkpoint.dtypes import compute_dtype
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.source import SourceView, TensorSource
from fishertool.errors import InputError, some
from fishertool.models.names import empty_model, names_on_disk


@dataclass(frozen=True)
class TokenRows:
    """Where the rows of one model's token tensors come from, by output row; -1 is nowhere."""

    own: Tensor
    """Its own row, [output row]."""
    donors: Sequence[tuple[TensorSource, Tensor]]
    """Models and their rows; where `own` has none, the mean of those that there are, or zero."""

    @property
    def size(self) -> int:
        return len(self.own)


class TokenAligned(SourceView):
    """A model whose token tensors are read by output rows, in float32 (F64 in float64).

    Raises InputError, by name, where it cannot be told which tensors these are.
    """

    def __init__(self, source: TensorSource, rows: TokenRows):
        super().__init__(source)
        self.rows, self.by_token = rows, token_tensors(source)

    def info(self, name: str) -> TensorInfo:
        info = self.source.info(name)
        if name not in self.by_token:
            return info
        return replace(info, shape=(self.rows.size, *info.shape[1:]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `[start, stop)` of a tensor, as `Checkpoint.read` gives them."""
        if name not in self.by_token:
            return self.source.read(name, start, stop)
        info = self.info(name)
        stop = info.rows if stop is None else stop
        dtype = compute_dtype(info.dtype)
        own = self.rows.own[start:stop]
        values = torch.zeros(len(own), *info.shape[1:], dtype=dtype)
        lacking = own < 0
        values[~lacking] = gather(partial(self.source.read, name), own[~lacking]).to(dtype)
        if bool(lacking.any()):
            values[lacking] = self._donated(name, start, stop, values[lacking], lacking)
        return values

    def _donated(self, name: str, start: int, stop: int, zeros: Tensor, lacking: Tensor) -> Tensor:
        total, count = zeros.clone(), torch.zeros(len(zeros), dtype=zeros.dtype)
        for source, rows in self.rows.donors:
            wanted = rows[start:stop][lacking]
            given = wanted >= 0
            if not bool(given.any()):
                continue
            if name not in source or source.info(name).shape[1:] != self.info(name).shape[1:]:
                raise InputError(
                    f"{source.folder}: has no {name} of the same width as {self.folder}'s, which "
                    "lacks some of its tokens"
                )
            total[given] += gather(partial(source.read, name), wanted[given]).to(total.dtype)
            count += given
        return total / count.clamp(min=1).reshape(-1, *[1] * (total.dim() - 1))


def gather(read: Callable[[int, int], Tensor], rows: Tensor) -> Tensor:
    """Rows in any order, of what `read` gives rows `[start, stop)` of; neighbours are read together."""
    if not len(rows):
        return read(0, 0)
    wanted, places = torch.unique(rows, return_inverse=True)
    breaks = (wanted.diff() != 1).nonzero().flatten() + 1
    runs = wanted.tensor_split(breaks)
    return torch.cat([read(int(run[0]), int(run[-1]) + 1) for run in runs])[places]


def token_tensors(source: TensorSource) -> set[str]:
    """Names of tensors whose rows are tokens: the input embedding, the output layer and its bias.

    These are what the architecture says they are, under any name, and what it ties to them. Raises
    InputError for an architecture that transformers does not have, and for any other tensor that
    is as long as the vocabulary.
    """
    module = empty_model(source)
    if module is None:
        raise InputError(
            f"{source.folder}: its embeddings cannot be told from its other tensors: its "
            "architecture is not in transformers"
        )
    own = [
        parameter
        for layer in (module.get_input_embeddings(), module.get_output_embeddings())  # type: ignore[operator]
        if layer is not None
        for parameter in layer.parameters(recurse=False)
    ]
    size = len(own[0])
    tied = {id(parameter) for parameter in own if len(parameter) == size}
    stored = names_on_disk(module, source)
    parameters = module.named_parameters(remove_duplicate=False)
    found = {stored.get(name, name) for name, parameter in parameters if id(parameter) in tied}
    found = {name for name in found if name in source}
    unknown = [name for name in source if size in source.info(name).shape and name not in found]
    if unknown:
        raise InputError(
            f"{source.folder}: {some(unknown)} may be by token, with {size} entries like the "
            "vocabulary, and is neither an embedding nor an output layer; it cannot be matched"
        )
    return found
