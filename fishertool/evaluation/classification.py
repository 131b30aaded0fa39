"""Loss, accuracy and macro-F1 of a classifier."""

from math import nan

import torch
from torch import Tensor


def classification_metrics(log_p: Tensor, targets: Tensor) -> dict[str, float]:
    """Means over examples. Shapes: `log_p` [example, class], `targets` [example].

    macro_f1 is the plain mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in the
    targets or the predictions, as scikit-learn's `f1_score(average="macro")`. With a NaN in
    `log_p` all are NaN.
    """
    if log_p.isnan().any():
        return dict.fromkeys(("loss", "accuracy", "macro_f1"), nan)
    predicted = log_p.argmax(-1)
    classes: Tensor = torch.cat([targets, predicted]).unique()  # type: ignore[no-untyped-call]
    hits = torch.stack([((predicted == c) & (targets == c)).sum() for c in classes]).double()
    sizes = torch.stack([(predicted == c).sum() + (targets == c).sum() for c in classes]).double()
    return {
        "loss": float(-log_p.gather(-1, targets.unsqueeze(-1)).double().mean()),
        "accuracy": float((predicted == targets).double().mean()),
        "macro_f1": float((2 * hits / sizes).mean()),
    }
