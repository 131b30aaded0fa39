"""How much of every model's loss a linear merge costs, predicted from the models' sidecars."""

from fishertool.checkpoint.stream import Piece, pieces, stream
from fishertool.errors import UsageError
from fishertool.fisher.predicted_loss import PieceSums, quadratic_forms
from fishertool.progress import Advance
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import reader

LINEAR = ("linear", "task-arithmetic")
"""Methods whose result is a sum of the models by their weights."""


def check_optimal(plan: MergePlan, free: bool) -> None:
    """Refuse a merge whose best weights have no closed form."""
    flag = "--weights optimal-free" if free else "--weights optimal"
    if plan.unit is None:
        raise UsageError(f"{flag} needs a --fisher with a diagonal for each model, of one unit")
    allowed = LINEAR[1:] if free else LINEAR
    if plan.method.name not in allowed:
        raise UsageError(f"{flag} is for method {' or '.join(allowed)}, not {plan.method.name}")
    if plan.method.name == "linear":  # weights that sum to 1 are normalized already
        return
    settings = [target.settings for target in plan.targets.values()]
    if any(one["lambda_"] != 1 or one["normalize"] for one in settings):
        raise UsageError(
            f"{flag} finds the weights for lambda 1 and normalize false: set neither otherwise"
        )


def gather_forms(plan: MergePlan, threads: int, advance: Advance) -> PieceSums:
    """Q_t[i, j] = tau_i^T F_t tau_j of every merged tensor, in one pass over models and Fishers."""
    sums = PieceSums()
    predicted = [target for target in plan.targets.values() if plan.fishers_of(target)]

    def one(piece: Piece) -> None:
        part = reader(plan, plan.targets[piece.name])(piece)
        fishers = [fisher.values for fisher in part.fishers]
        sums.add(piece.name, piece.start, quadratic_forms(part.models, fishers, part.base))

    stream(pieces(target.info for target in predicted), one, threads, advance)
    return sums
