"""Print the quickstart's result from the reports it left: what merging gained, or did not."""

import json
import sys
from pathlib import Path

MODELS = {
    "model-a": "tuned on half A",
    "model-b": "tuned on half B",
    "linear": "merged, plain average",
    "fisher": "merged, Fisher-weighted",
}


def accuracy(report: Path) -> float:
    summary = json.loads(report.read_text(encoding="utf-8"))["summary"]
    return float(summary["accuracy"])


def main(work: Path) -> None:
    print(f"\n{'accuracy on held-out text':<26}{'half A':>8}{'half B':>8}{'mean':>8}{'worst':>8}")
    for model, title in MODELS.items():
        scores = [accuracy(work / f"{model}-on-{half}.json") for half in "ab"]
        columns = [*scores, sum(scores) / 2, min(scores)]
        print(f"{title:<26}" + "".join(f"{value:>8.3f}" for value in columns))
    print("\n400 texts a half: differences under about 0.03 are within the noise.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
