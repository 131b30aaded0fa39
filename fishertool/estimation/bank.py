"""The gradient bank of a run: what gathers its members and what writes them."""

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor

from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.layout import show_size
from fishertool.checkpoint.staging import free_bytes
from fishertool.checkpoint.stored import BITS
from fishertool.errors import UsageError
from fishertool.estimation.partial import Job
from fishertool.estimation.settings import BANK_DTYPES
from fishertool.estimation.work import Unit
from fishertool.fisher.gradient_bank import GradientBank
from fishertool.fisher.header import TensorStatistics
from fishertool.sidecar import BankWriter


@dataclass(frozen=True)
class Bank:
    statistic: GradientBank
    writer: BankWriter
    members: Sequence[int]
    """Those in the file, in its order."""

    def count_written(self, members: Iterable[int]) -> None:
        """These are there from an earlier run, or from another process."""
        place = {member: n for n, member in enumerate(self.members)}
        for member in members:
            self.writer.count_written(place[member])

    def sync(self) -> None:
        self.writer.sync()


def members_of(units: Sequence[Unit], group: int) -> list[int]:
    """The members that the examples of these units belong to."""
    return sorted({n // group for unit in units for batch in unit for n in batch})


@contextmanager
def open_bank(
    folder: Path,
    job: Job,
    parameters: Mapping[str, Tensor],
    members: Sequence[int],
    shard_bytes: int,
    reopen: bool = False,
) -> Iterator[Bank]:
    """Reserve the disk space for these members, or with `reopen` go on with what is there.

    Raises OSError (no space left) with the bank's size and the ways to make it smaller, and
    UsageError where another process made the folder and this one does not see it.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: the first process writes there, and this one does not see it; give an --out "
            "on a disk that all share, or run --part 1/n ... n/n and combine-fisher"
        )
    with bank_writer(folder, job, len(members), shard_bytes, reopen) as writer:
        place = {member: n for n, member in enumerate(members)}

        def write(name: str, member: int, gradient: Tensor) -> None:
            writer.write(name, place[member], gradient)

        dtype = TORCH[BANK_DTYPES[job.bank_dtype]]
        yield Bank(GradientBank(parameters, write, dtype, job.header.group), writer, members)


def bank_writer(
    folder: Path, job: Job, members: int, shard_bytes: int, reopen: bool = False
) -> BankWriter:
    dtype = BANK_DTYPES[job.bank_dtype]
    needed = sum(map(prod, job.shapes.values())) * members * BITS[dtype] // 8
    if not reopen and needed > (free := free_bytes(folder)):
        raise OSError(
            errno.ENOSPC,
            f"the bank takes {show_size(needed)}, {show_size(free)} are free; take fewer "
            "--num-examples, a larger --group, or --include fewer tensors",
            str(folder.parent),
        )
    statistics = {name: TensorStatistics(prod(shape)) for name, shape in job.shapes.items()}
    header = replace(job.header, kind="rank-one", statistics=statistics)
    return BankWriter(folder, header, job.shapes, dtype, members, shard_bytes, reopen)
