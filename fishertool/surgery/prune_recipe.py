"""How a model is to be pruned, resolved from flags; what does not go together is refused here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from fishertool.errors import UsageError
from fishertool.models.units import PATTERNS
from fishertool.pruning.parts.masks import BUDGETS, Budget, Pattern, parse_pattern
from fishertool.registry import PRUNING, Method, find_method, suggest

PATTERN_WORDS = ("unstructured", *PATTERNS, "n:m such as 2:4", "blocks such as 1x4")
COMPENSATE = ("none", "summed", "joint", "columnwise", "auto")
NORMALIZE = ("none", "mean")
KINDS = {
    "fisher": "diagonal",
    "gradient": "mean-gradient",
    "inverse_diagonal": "rank-one",
    "inverse_blocks": "rank-one",
    "activations": "activation",
}
"""Input of a method -> the kind of Fisher it is of; `general_...` are of the general sidecar."""
GENERAL = ("general", "general_gradient")
DEFAULT_BUDGET: dict[str, Budget] = {"wanda": "row", "fisher": "row"}
"""Wanda's by definition; of the diagonal Fisher, measured: README has what a tensor's costs."""
DEFAULT_BLOCK: dict[str, int | None] = {"mfac": None}
BLOCK = 128
DAMPING = 1e-3
MOMENT_DAMPING = 0.01
LARGEST_GROUP = 8
"""Of weights whose sets OBS weighs against one another: 4 of 8 are 70 sets."""
LARGEST_SET = 64
"""Of weights that OBS judges as the one set they are, at the cost of an inverse a set."""
TOO_SMALL = 1e-6
"""Damping below which a block of more weights than gradients tells of nothing but damping."""


@dataclass(frozen=True)
class Recipe:
    method: Method
    settings: dict[str, Any]
    pattern: Pattern
    sparsity: float
    budget: Budget
    normalize: str
    updates: tuple[str, ...]
    """Ways to move the weights that stay; one, or with `gated` those to choose from."""
    gated: bool
    block: int | None
    """Weights in a block of the rank-one Fisher; None takes it whole."""
    damping: float | None
    """Of the rank-one Fisher, relative to its mean. None is chosen on held-out data."""
    moment_damping: float | None
    """Of the inputs' second moment, relative to its mean; chosen together with the other."""
    steps: int
    recover_steps: int

    @property
    def kinds(self) -> list[str]:
        """Kinds of Fisher that are needed."""
        found = [KINDS[name] for name in self.method.inputs if name in KINDS]
        found += ["activation" if one == "columnwise" else "rank-one" for one in self.updates]
        return list(dict.fromkeys(found))

    @property
    def needs_general(self) -> bool:
        return any(name in self.method.inputs for name in GENERAL)

    @property
    def has_damping(self) -> bool:
        return "rank-one" in self.kinds or self.inverts_moment

    @property
    def damps_saliency(self) -> bool:
        """Whether it is not only updates that are damped."""
        by_bank = {"inverse_diagonal", "inverse_blocks"} & self.method.inputs.keys()
        return bool(by_bank) or "damping" in self.settings

    @property
    def inverts_moment(self) -> bool:
        return "columnwise" in self.updates or "damping" in self.settings

    @property
    def group(self) -> int:
        """Weights that OBS judges together: those a pattern takes some of, or all, at once."""
        size = self.pattern.m or self.pattern.columns
        known = "inverse_blocks" in self.method.inputs and self.block is not None
        return size if known and size <= (LARGEST_GROUP if self.pattern.m else LARGEST_SET) else 1

    @property
    def pruned_of_group(self) -> int:
        """How many of them go."""
        if self.group == 1:
            return 1
        return self.pattern.m - self.pattern.n if self.pattern.m else self.pattern.columns

    @property
    def chooses_in_columns(self) -> bool:
        """Whether masks are chosen while weights move."""
        one_by_one = self.pattern.rows * self.pattern.columns == 1
        return self.method.name == "sparsegpt" and "columnwise" in self.updates and one_by_one

    @property
    def schedule(self) -> list[Self]:
        """The same for each step, on the way from 1 to the density geometrically; of n:m a step for
        every n on the way, which may be fewer than `steps`."""
        shares = [step / self.steps for step in range(1, self.steps)]
        n, m = self.pattern.n, self.pattern.m
        if not m:
            sparsities = (1 - (1 - self.sparsity) ** share for share in shares)
            return [*(replace(self, sparsity=sparsity) for sparsity in sparsities), self]
        counts = dict.fromkeys(round(m * (n / m) ** share) for share in shares)
        patterns = [replace(self.pattern, n=now) for now in counts if n < now < m]
        return [*(replace(self, pattern=one, sparsity=1 - one.n / m) for one in patterns), self]

    @property
    def warnings(self) -> list[str]:
        made = self.schedule
        if len(made) == self.steps:
            return []
        patterns = ", ".join(str(one.pattern) for one in made)
        return [
            f"--steps {self.steps}: --pattern {self.pattern} is reached in {len(made)}: {patterns}"
        ]

    def with_damping(self, damping: float) -> Self:
        settings = self.settings | ({"damping": damping} if "damping" in self.settings else {})
        return replace(self, damping=damping, moment_damping=damping, settings=settings)


def resolve_recipe(
    method: str,
    settings: Mapping[str, Any],
    *,
    sparsity: float | None,
    pattern: str,
    budget: str | None,
    normalize: str,
    compensate: str | None,
    block: str | None,
    damping: str | None,
    steps: int,
    recover_steps: int,
) -> Recipe:
    """Raises UsageError for what is unknown, out of range or contradicts itself."""
    chosen = find_method(PRUNING, method)
    try:
        parsed = parse_pattern(pattern)
    except ValueError as error:
        told = suggest(pattern, PATTERN_WORDS) if pattern.isalpha() else error
        raise UsageError(f"--pattern {told}") from None
    if compensate is None:
        compensate = "columnwise" if method == "sparsegpt" else "none"
    for flag, value, known in (
        ("--budget", budget or "tensor", BUDGETS),
        ("--normalize", normalize, NORMALIZE),
        ("--compensate", compensate, COMPENSATE),
    ):
        if value not in known:
            raise UsageError(f"{flag} {suggest(value, known)}")
    recipe = Recipe(
        chosen,
        chosen.parse(settings),
        parsed,
        _sparsity(parsed, sparsity),
        cast(Budget, budget or DEFAULT_BUDGET.get(method, "tensor")),
        normalize,
        _updates(chosen, compensate),
        compensate == "auto",
        _block(block, DEFAULT_BLOCK.get(method, BLOCK)),
        None,
        None,
        steps,
        recover_steps,
    )
    _check(recipe, budget, block, damping)
    if damping == "auto" or not recipe.has_damping:
        return recipe
    if damping is not None:
        return recipe.with_damping(_damping("--damping", damping))
    moment = _damping("--set damping", recipe.settings.get("damping", MOMENT_DAMPING))
    return replace(recipe, damping=DAMPING, moment_damping=moment)


def aligned(block: int, width: int, group: int = 1) -> int:
    """The largest divisor of a row's width in the upper half below `block`; `block` if there is none,
    when blocks run on over the ends of rows. Of whole groups, which divide the width.

    >>> aligned(128, 384), aligned(50, 384), aligned(50, 384 + 1), aligned(128, 16)
    (128, 48, 35, 16)
    >>> aligned(13, 20), aligned(13, 20, 4)
    (10, 12)
    """
    if block >= width:
        return width
    block -= block % group
    found = [
        size for size in range(block, block // 2, -1) if width % size == 0 and size % group == 0
    ]
    return found[0] if found else block


def _sparsity(pattern: Pattern, given: float | None) -> float:
    if pattern.m:
        implied = 1 - pattern.n / pattern.m
        if given is not None and abs(given - implied) > 1e-9:
            raise UsageError(f"--sparsity {given:g}: --pattern {pattern} makes it {implied:g}")
        return implied
    if given is None:
        raise UsageError("prune needs --sparsity, the share of weights to be zero, as 0.5")
    if not 0 <= given < 1:
        raise UsageError(f"--sparsity {given:g}: is at least 0 and below 1")
    return given


def _updates(method: Method, compensate: str) -> tuple[str, ...]:
    if compensate == "none":
        return ()
    if compensate != "auto":
        return (compensate,)
    return ("columnwise",) if "activations" in method.inputs else ("summed", "joint")


def _block(given: str | None, default: int | None) -> int | None:
    if given is None:
        return default
    if given == "whole":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"--block {given!r}: a number of weights, or whole")
    return int(given)


def _damping(flag: str, given: str | float) -> float:
    try:
        damping = float(given)
    except ValueError:
        damping = -1.0
    if not 0 < damping < float("inf"):
        raise UsageError(f"{flag} {given!r}: a number above 0, or --damping auto")
    return damping


def _check(recipe: Recipe, budget: str | None, block: str | None, damping: str | None) -> None:
    name = recipe.method.name
    if block is not None and "rank-one" not in recipe.kinds:
        raise UsageError(
            "--block is for obs, mfac, and --compensate summed or joint; nothing here asks for a "
            "rank-one Fisher"
        )
    if recipe.block is not None and recipe.block < recipe.group:
        raise UsageError(
            f"--block {recipe.block}: --pattern {recipe.pattern} is judged {recipe.group} weights "
            f"at a time; take --block {recipe.group} or more"
        )
    if damping is not None and not recipe.has_damping:
        raise UsageError(f"--damping: method {name} inverts nothing; leave it out")
    if damping is not None and recipe.settings.get("damping") != recipe.method.settings.get(
        "damping"
    ):
        raise UsageError("--damping and --set damping say it twice")
    if budget is not None and recipe.pattern.m:
        raise UsageError(f"--budget {budget}: --pattern {recipe.pattern} leaves no budget to share")
    if recipe.chooses_in_columns and recipe.budget == "global":
        raise UsageError(
            "--budget global: sparsegpt chooses matrix by matrix, while it moves weights; take "
            "--compensate none, or --budget tensor or row"
        )
    if recipe.normalize != "none" and recipe.budget != "global":
        raise UsageError("--normalize is for --budget global, which compares matrices")
    if recipe.steps > 1 and recipe.needs_general:
        raise UsageError(f"--steps: {name} goes by two sidecars, which are not estimated anew")
