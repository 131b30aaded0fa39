"""From the command line's budget to ranks: what was asked for, and what it gives each matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fishertool.errors import UsageError
from fishertool.factorization import rank as ranks
from fishertool.factorization.rank import Ranks, Shapes
from fishertool.registry import suggest

ALLOCATIONS = ("uniform", "energy", "global", "auto")
SHARED = {"energy": ranks.under_budget_by_energy, "global": ranks.under_budget_globally}


@dataclass(frozen=True)
class Budget:
    """One of the first four is given. Raises UsageError for any other number of them, for one out
    of range, and for an allocation that has no budget to divide."""

    keep: float | None = None
    """Share of the selected weights' parameters."""
    rank: int | None = None
    energy: float | None = None
    """Share of each matrix's squared singular values."""
    target_parameters: int | None = None
    """Of the whole model."""
    allocate: str | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        given = {
            "--keep": self.keep,
            "--rank": self.rank,
            "--energy": self.energy,
            "--target-parameters": self.target_parameters,
        }
        flags = [flag for flag, value in given.items() if value is not None]
        if len(flags) != 1:
            raise UsageError(f"give one of {', '.join(given)}; {len(flags)} given")
        for flag, share in (("--keep", self.keep), ("--energy", self.energy)):
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"{flag} {share:g} is not in (0, 1]")
        for flag, count in (("--rank", self.rank), ("--rank-multiple", self.multiple)):
            if count is not None and count < 1:
                raise UsageError(f"{flag} {count} is not at least 1")
        if self.rank is not None and self.rank % self.multiple:
            raise UsageError(
                f"--rank {self.rank}: is no multiple of --rank-multiple {self.multiple}; give one, or "
                "leave --rank-multiple out"
            )
        if self.allocate is not None and self.allocate not in ALLOCATIONS:
            raise UsageError(f"--allocate {suggest(self.allocate, ALLOCATIONS)}")
        if self.allocate is not None and not self.is_shared:
            raise UsageError(
                f"--allocate {self.allocate} divides a budget; with it give --keep or "
                f"--target-parameters, not {flags[0]}"
            )

    @property
    def is_shared(self) -> bool:
        return self.keep is not None or self.target_parameters is not None

    @property
    def name(self) -> str:
        """How ranks are allocated that follow from shapes alone."""
        return "rank" if self.rank is not None else "uniform"

    @property
    def needs_spectra(self) -> bool:
        return self.energy is not None or self.allocate not in (None, "uniform")

    def kept_of(self, shapes: Shapes, others: int) -> int:
        """The parameters of these matrices that may stay, `others` being the model's other parameters.

        Raises UsageError for a budget that cannot be met.
        """
        whole = ranks.total(shapes, dict.fromkeys(shapes))
        if self.keep is not None:
            budget, flag = int(round(self.keep * whole, 3)), f"--keep {self.keep:g}"
        else:
            assert self.target_parameters is not None
            budget, flag = self.target_parameters - others, "--target-parameters"
            if budget >= whole:
                raise UsageError(f"{flag}: the model has {others + whole:,}, which is no more")
        needed = ranks.least(shapes, self.multiple)
        if budget < needed:
            less = f"; of the model, that is {others + needed:,}" if self.keep is None else ""
            raise UsageError(
                f"{flag}: leaves {max(budget, 0):,} parameters for what is factorized, and ranks "
                f"of {self.multiple} already take {needed:,}{less}"
            )
        return budget

    def check_rank(self, shapes: Shapes) -> None:
        """Refuse matrices of which none can have factors, and a rank above a side. Raises UsageError,
        naming the matrix."""
        if not any(ranks.largest_saving(shape, self.multiple) for shape in shapes.values()):
            raise UsageError(
                f"nothing can be factorized: of none of {len(shapes)} selected matrices have factors "
                f"of rank {self.multiple} fewer parameters than the matrix; "
                + ("lower --rank-multiple" if self.multiple > 1 else "select others with --include")
            )
        for name, shape in shapes.items():
            if self.rank is not None and self.rank > min(shape):
                raise UsageError(
                    f"--rank {self.rank}: is above the smaller side of {name}, {list(shape)}; "
                    "lower it, or leave that out with --exclude"
                )

    def known(self, shapes: Shapes, others: int) -> Ranks:
        """Ranks that follow from shapes alone. Raises UsageError as `kept_of` does."""
        if self.rank is not None:
            return ranks.fixed(shapes, self.rank, self.multiple)
        return ranks.under_budget_uniformly(shapes, self.kept_of(shapes, others), self.multiple)

    def candidates(
        self, spectra: Mapping[str, Tensor], shapes: Shapes, others: int
    ) -> dict[str, Ranks]:
        """By allocation: one, or for `auto` all of them."""
        if self.energy is not None:
            return {"energy": ranks.by_energy(spectra, shapes, self.energy, self.multiple)}
        budget = self.kept_of(shapes, others)
        found: dict[str, Ranks] = {}
        if self.allocate == "auto":
            found["uniform"] = ranks.under_budget_uniformly(shapes, budget, self.multiple)
        for name, allocate in SHARED.items():
            if self.allocate in (name, "auto"):
                found[name] = allocate(spectra, shapes, budget, self.multiple)
        return found
