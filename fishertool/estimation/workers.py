"""Several processes on one estimate: each has a share of the examples, and their sums are added once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from fishertool.errors import FishertoolError, UsageError
from fishertool.estimation.settings import Settings
from fishertool.estimation.work import Share, Unit, Work, parse_share
from fishertool.estimation.worker import Worker
from fishertool.fisher.kinds import Gathering
from fishertool.fisher.moments import TraceMoments
from fishertool.fisher.sums import Sums, absorb, flattened
from fishertool.launcher import world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The processes that `torchrun`, `accelerate launch` or Slurm started together; or one alone."""

    share: Share
    device: torch.device

    @property
    def alone(self) -> bool:
        return self.share.of == 1

    @property
    def first(self) -> bool:
        return self.share.number == 0

    @property
    def shards(self) -> int:
        """Into so many the weights are cut."""
        return 1

    @property
    def loads_on(self) -> str:
        """The device on which this process loads the model."""
        return str(self.device)

    def units_of(self, work: Work, share: Share) -> list[Unit]:
        return work.share(share)

    def begin(self, gathering: Gathering) -> None:
        """Before the first batch."""

    def add_up(self, worker: Worker) -> None:
        """Make everyone's sums those of all workers."""
        if self.alone:
            return
        sums = flattened(worker.groups)
        others = self._gather((worker.progress(), {n: tuple(s.shape) for n, s in sums.items()}))
        for progress, shapes in others:
            worker.take_notes(progress)
            missing = {
                name: torch.zeros(shape, dtype=torch.float64)
                for name, shape in shapes.items()
                if name not in sums
            }
            absorb(worker.groups, missing)
            sums = flattened(worker.groups)
        self._add(sums)

    def relative_error(self, worker: Worker, traces: TraceMoments) -> float:
        """Of the worst-known trace, by what all workers have so far."""
        total, examples = traces.copy(), worker.done.sums["examples"].clone()
        self._add({"examples": examples, **flattened(total.groups)})
        return total.relative_error(int(examples))

    def complete(self, name: str, rows: Tensor) -> Tensor:
        """For the first process: a weight's rows from everyone's."""
        return rows

    def serve(self, gathering: Gathering) -> None:
        """For the other processes: what the first one lacks, until it releases them."""

    def release(self) -> None:
        """For the first process: the others are done."""

    def first_one(self, item: T) -> T:
        """Of everyone's item, that of the first."""
        items = [item]
        if not self.alone:
            distributed.broadcast_object_list(items)
        return items[0]

    def _gather(self, item: Any) -> list[Any]:
        """Everyone's item, in the order of the workers."""
        items = [None] * self.share.of
        distributed.all_gather_object(items, item)
        return items

    def _add(self, sums: Sums) -> None:
        """Make every tensor, in place, its sum over the workers; all must have the same names."""
        for name in sorted(sums) if not self.alone else ():
            moved = sums[name].to(self.device)
            distributed.all_reduce(moved)
            sums[name].copy_(moved)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The block is for the first process, and then for the others; what one of them raises stops
        them all."""
        if not self.first:
            self._agree(None)
        try:
            yield
        except Exception as error:
            self._agree(str(error))
            raise
        if self.first:
            self._agree(None)
        self._agree(None)

    def _agree(self, failure: str | None) -> None:
        """Raises FishertoolError with the failure of another process."""
        told = [] if self.alone else self._gather(failure)
        for number, other in enumerate(told):
            if failure is None and other is not None:
                raise FishertoolError(f"process {number} of {len(told)}: {other}")


ADDITIVE = ("columns", "pass")
"""Of the sums under FSDP: the others are spread over the processes by rows, or everyone's alike."""


class ShardedWorkers(Workers):
    """Workers of which each has a shard of every weight, and all run a step together.

    At the end rows go to the first process when it asks for them, a tensor at a time: it never
    holds more than one, besides its own shards.
    """

    @property
    def shards(self) -> int:
        return self.share.of

    @property
    def loads_on(self) -> str:
        return "cpu" if self.first else "meta"

    def units_of(self, work: Work, share: Share) -> list[Unit]:
        return work.even_share(share)

    def begin(self, gathering: Gathering) -> None:
        gathering.traces.add_shards = lambda parts: self._add({"parts": parts})

    def add_up(self, worker: Worker) -> None:
        for progress in self._gather(worker.progress()):
            worker.take_notes(progress)
        groups = {name: sums for name, sums in worker.groups.items() if name in ADDITIVE}
        self._add(flattened(groups))

    def relative_error(self, worker: Worker, traces: TraceMoments) -> float:
        examples = worker.done.sums["examples"].clone()
        self._add({"examples": examples})
        return traces.relative_error(int(examples))

    def complete(self, name: str, rows: Tensor) -> Tensor:
        distributed.broadcast_object_list([name])
        sizes = self._gather(len(rows))
        whole = torch.empty(sum(sizes), *rows.shape[1:], dtype=rows.dtype)
        for number, part in enumerate(torch.split(whole, sizes)):
            if number == 0:
                part.copy_(rows)
            elif len(part):
                received = part.to(self.device)
                distributed.recv(received, number)
                part.copy_(received)
        return whole

    def serve(self, gathering: Gathering) -> None:
        while (name := self._asked()) is not None:
            rows = gathering.rows[name]
            self._gather(len(rows))
            if len(rows):
                distributed.send(rows.to(self.device), 0)

    def release(self) -> None:
        distributed.broadcast_object_list([None])

    def _asked(self) -> str | None:
        asked: list[str | None] = [None]
        distributed.broadcast_object_list(asked)
        return asked[0]


@contextmanager
def joined(asked: int | None, device: str, sharded: bool = False) -> Iterator[Workers]:
    """Join the processes that the environment names (RANK, WORLD_SIZE, as torchrun sets them).

    `asked` is how many there must be. Raises UsageError where there are others: a launcher that
    started one process of several would otherwise go unnoticed; or where there is nobody to share
    the weights with, which are to be `sharded`; or where variables of the environment are missing.
    """
    of = world_size()
    if asked is not None and asked != of:
        raise UsageError(
            f"--world-size {asked}: this run has {of}; start it with "
            f"torchrun --nproc-per-node {asked} -m fishertool ..."
        )
    if of == 1 and sharded:
        raise UsageError(
            "--fsdp shards the weights over several processes, and this run has one; start it "
            "with torchrun --nproc-per-node N -m fishertool ..."
        )
    if of == 1:
        yield Workers(Share(), torch.device(device))
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        share = Share(distributed.get_rank(), distributed.get_world_size())
        yield ShardedWorkers(share, place) if sharded else Workers(share, place)
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise FishertoolError("another process of this run has ended; see what it said") from error
    finally:
        distributed.destroy_process_group()


def share_of(part: str | None, workers: Workers, settings: Settings) -> Share:
    """This process's share of the work. Raises UsageError for what cannot be shared so."""
    if part is None:
        return workers.share
    if not workers.alone:
        raise UsageError("--part is for processes that know nothing of each other, not torchrun's")
    if settings.until_relative_error is not None:
        raise UsageError(
            "--until-relative-error needs the sums of all parts; --part has only its own"
        )
    return parse_share(part)
