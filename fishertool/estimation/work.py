"""The work of an estimate: all micro-batches, the same for any number of workers, and their shares."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fishertool.errors import UsageError
from fishertool.fisher.batches import micro_batches

Batch = list[int]
Unit = list[Batch]
"""Batches after which the sums are complete: the work can stop, be saved or go on elsewhere."""

WINDOW = 64
"""Examples between looks at the error, where a run stops by it."""


@dataclass(frozen=True)
class Share:
    """Which part of the work is one worker's: `number` from 0 on, `of` so many."""

    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.of}"


def parse_share(text: str) -> Share:
    """`i/n` with i from 1 to n, as `--part` takes it."""
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return Share(int(number) - 1, int(of))
    raise UsageError(f"--part {text!r}: write i/n, with i from 1 to n")


@dataclass(frozen=True)
class Work:
    units: list[Unit]
    windows: bool
    """Whether units are windows, whose batches workers divide among them: all of them look at the
    error after each."""

    def sha256(self) -> str:
        """Of who runs with whom: what is equal here can be resumed and combined."""
        return hashlib.sha256(json.dumps(self.units).encode()).hexdigest()

    def share(self, share: Share) -> list[Unit]:
        if self.windows:
            return [unit[share.number :: share.of] for unit in self.units]
        return self.units[share.number :: share.of]

    def even_share(self, share: Share) -> list[Unit]:
        """The same, with empty batches at the end of units, and units of them at the end, so that
        every worker has as many."""
        if self.windows:
            most = [-(-len(unit) // share.of) for unit in self.units]
        else:
            most = [len(unit) for unit in self.units[:: share.of]]
        mine = self.share(share)
        mine += [[] for _ in most[len(mine) :]]
        return [unit + [[]] * (n - len(unit)) for unit, n in zip(mine, most, strict=True)]


def divide(
    sizes: Sequence[int],
    rows: Sequence[int],
    *,
    size: int | None,
    group: int = 1,
    shuffle_by: int | None = None,
) -> Work:
    """All of the work, for examples of these sizes in tokens and with so many rows each.

    size        examples a micro-batch; None goes by tokens
    group       so many examples, in data order, make a unit: a member of a gradient bank
    shuffle_by  a seed: windows of examples in random order, so that those done so far are a
                fair sample of all
    """
    if shuffle_by is not None:
        generator = torch.Generator().manual_seed(shuffle_by)
        order = torch.randperm(len(sizes), generator=generator).tolist()
        step = WINDOW
    elif group > 1:
        order, step = list(range(len(sizes))), group
    else:
        units = [[batch] for batch in micro_batches(sizes, rows_each=rows, size=size)]
        return Work(units, False)
    chunks = [order[start : start + step] for start in range(0, len(order), step)]
    units = [micro_batches(sizes, chunk, rows_each=rows, size=size) for chunk in chunks]
    return Work(units, shuffle_by is not None)
