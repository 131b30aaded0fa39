"""One worker of an estimate: its sums, how far it is, and adding what another one has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fishertool.errors import InputError
from fishertool.estimation.partial import Job, Partial, Progress
from fishertool.fisher.estimate import Pass
from fishertool.fisher.kinds import Gathering
from fishertool.fisher.sums import Groups, absorb


@dataclass
class Worker:
    job: Job
    number: int
    gathering: Gathering
    members: Sequence[int] = ()
    """Of a gradient bank, those it has."""
    done: Pass = field(default_factory=Pass)
    units: int = 0
    """Units of its share that are done."""

    @property
    def groups(self) -> Groups:
        own = {"pass": self.done.sums, "expert-tokens": self.done.tokens}
        return {**self.gathering.groups, **own}

    def progress(self) -> Progress:
        inputs = self.gathering.inputs
        return Progress(
            number=self.number,
            units=self.units,
            one_by_one=self.done.one_by_one,
            by_autograd=sorted(self.done.by_autograd),
            touched=sorted(self.done.touched),
            leaders={} if inputs is None else dict(inputs.leader),
            transposed=[] if inputs is None else sorted(inputs.transposed),
            members=list(self.members),
        )

    def partial(self) -> Partial:
        return Partial(self.job, self.progress())

    def take(self, progress: Progress, sums: Mapping[str, Tensor]) -> None:
        """Add what another one has, or this one had before."""
        absorb(self.groups, sums)
        self.take_notes(progress)

    def take_notes(self, progress: Progress) -> None:
        """Add what of another's result is not a sum."""
        self.done.one_by_one |= progress.one_by_one
        self.done.by_autograd |= set(progress.by_autograd)
        self.done.touched |= set(progress.touched)
        if (inputs := self.gathering.inputs) is None:
            return
        inputs.transposed |= set(progress.transposed)
        for name, leader in progress.leaders.items():
            if inputs.leader.setdefault(name, leader) != leader:
                raise InputError(
                    f"{name} shares its input with {leader} in one part and with "
                    f"{inputs.leader[name]} in another; --exclude one of them"
                )
