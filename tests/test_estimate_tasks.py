"""`fishertool estimate-fisher` of every task, against the definition one example at a time."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, make_text, write_rows
from safetensors.torch import load_file, save_file
from test_fisher_diagonal import assert_same, randomize
from torch import Tensor

Rows = list[dict[str, Any]]
Score = Callable[[Any], Tensor]
"""Of a model: log p of one example."""
CLS, SEP, MASK = 2, 3, 1
TEMPLATE = (
    "{% for m in messages %}"
    "{{ 'the' if m['role'] == 'user' else 'a' }} {{ m['content'] }} and {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def reference(model: Any, scores: Sequence[Score]) -> dict[str, Tensor]:
    """1/N sum_n (d log p_n / d w)^2, each by a float64 backward pass of its own."""
    model = model.double().eval()
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for score in scores:
        found = torch.autograd.grad(score(model), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sums[name] += gradient**2
    return {name: value / len(scores) for name, value in sums.items()}


def ids_of(text: str) -> list[int]:
    return [VOCABULARY.get(word, MASK) for word in text.split()]


def log_p(ids: list[int], targets: Mapping[int, int], **more: Tensor) -> Score:
    """Summed over the positions that have a target."""

    def score(model: Any) -> Tensor:
        values = torch.log_softmax(model(torch.tensor([ids]), **more).logits[0], -1)
        return torch.stack([values[place, target] for place, target in targets.items()]).sum()

    return score


def labelled_words() -> tuple[Rows, list[Score]]:
    """`cat-dog` is one word of three tokens."""
    rows: Rows = []
    scores: list[Score] = []
    for n in range(8):
        words = [*make_text(n, 1 + n).split(), "cat-dog", "runs"]
        classes = [(n + place) % 3 for place in range(len(words))]
        rows.append({"text": words, "label": classes})
        ids = [CLS, *ids_of(" ".join(words[:-2])), 9, MASK, 10, 12, SEP]
        assert VOCABULARY["cat"] == 9 and VOCABULARY["dog"] == 10 and VOCABULARY["runs"] == 12
        places = [*range(1, len(words)), len(words) + 2]
        targets = dict(zip(places, classes, strict=True))
        scores.append(log_p(ids, targets))
    return rows, scores


def masked_texts() -> tuple[Rows, list[Score]]:
    rows = [{"text": make_text(n, 1 + 2 * n)} for n in range(8)]
    scores: list[Score] = []
    for n, row in enumerate(rows):
        ids = [CLS, *ids_of(row["text"]), SEP]
        count = max(1, round(0.3 * (len(ids) - 2)))
        places = random.Random(f"4 {n}").sample(range(1, len(ids) - 1), count)
        targets = {place: ids[place] for place in places}
        for place in places:
            ids[place] = MASK
        scores.append(log_p(ids, targets))
    return rows, scores


def completed(prompts: Sequence[str], completions: Sequence[str]) -> list[Score]:
    scores: list[Score] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, ids = len(ids_of(prompt)), ids_of(prompt + completion)
        targets = {place - 1: ids[place] for place in range(before, len(ids))}
        scores.append(log_p(ids, targets))
    return scores


def prompts_and_completions() -> tuple[Rows, list[Score]]:
    prompts = [make_text(n, 1 + n) for n in range(8)]
    completions = [" " + make_text(20 + n, 9 - n) for n in range(8)]
    rows = [{"text": p, "more": c} for p, c in zip(prompts, completions, strict=True)]
    return rows, completed(prompts, completions)


def conversations() -> tuple[Rows, list[Score]]:
    rows, prompts, completions = [], [], []
    for n in range(8):
        first, answer, second, last, rest = (make_text(10 * n + k, 1 + k) for k in range(5))
        messages = [
            {"role": role, "content": text}
            for role, text in [
                ("user", first), ("assistant", answer), ("user", second), ("assistant", last),
                ("user", rest),
            ][: 5 - n % 2]
        ]  # fmt: skip
        rows.append({"messages": messages})
        prompts.append(f"the {first} and a {answer} and the {second} and a ")
        completions.append(f"{last} and ")
    return rows, completed(prompts, completions)


def texts_and_targets() -> tuple[Rows, list[Score]]:
    """Sources and targets of every order of lengths."""
    rows = [{"text": make_text(n, 1 + n), "wanted": make_text(9 + n, 6 - n % 6)} for n in range(8)]
    scores: list[Score] = []
    for row in rows:
        target = [CLS, *ids_of(row["wanted"]), SEP]
        shifted = torch.tensor([[0, *target[:-1]]])
        source = [CLS, *ids_of(row["text"]), SEP]
        scores.append(log_p(source, dict(enumerate(target)), decoder_input_ids=shifted))
    return rows, scores


def infonce(texts: Sequence[str]) -> Score:
    """log p of the second text for the first, each text encoded alone: mean pooling, cosine x 5."""

    def score(model: Any) -> Tensor:
        vectors = [
            model(torch.tensor([[CLS, *ids_of(text), SEP]])).last_hidden_state[0].mean(0)
            for text in texts
        ]
        query, *documents = [vector / vector.norm() for vector in vectors]
        return torch.log_softmax(5 * torch.stack([query @ one for one in documents]), 0)[0]

    return score


def pairs() -> tuple[Rows, list[Score]]:
    """Blocks of 3, 3 and 3 + 1 of ten; the second and third positive are the same text."""
    rows = [{"query": make_text(n, 2), "positive": make_text(30 + n, 1 + n)} for n in range(10)]
    rows[2]["positive"] = rows[1]["positive"]
    scores = []
    for block in (rows[:3], rows[3:6], rows[6:]):
        for row in block:
            others = dict.fromkeys(one["positive"] for one in block)
            texts = [row["positive"], *(text for text in others if text != row["positive"])]
            scores.append(infonce([row["query"], *texts]))
    return rows, scores


def triplets() -> tuple[Rows, list[Score]]:
    """One to three negatives a query, an empty one left out."""
    rows: Rows = []
    scores = []
    for n in range(8):
        query, positive, *negatives = (make_text(10 * n + k, 2 + k) for k in range(3 + n % 3))
        rows.append({"q": query, "p": positive, "n": [*negatives, ""]})
        scores.append(infonce([query, positive, *negatives]))
    return rows, scores


CASES: dict[str, tuple[str, str, Callable[[], tuple[Rows, list[Score]]], list[str]]] = {
    "words": ("bert", "ForTokenClassification", labelled_words, ["--labels", "empirical"]),
    "masked": ("bert", "ForMaskedLM", masked_texts, ["--mask-fraction", "0.3", "--seed", "4"]),
    "completions": (
        "gpt2", "", prompts_and_completions, ["--mask-prompt", "--text-pair-column", "more"],
    ),
    "conversations": (
        "llama", "", conversations, ["--mask-prompt", "--chat-column", "messages"],
    ),
    "targets": ("t5", "", texts_and_targets, ["--target-column", "wanted"]),
    "translations": ("marian", "", texts_and_targets, ["--target-column", "wanted"]),
    "pairs": ("bert", "Model", pairs, ["--in-batch-negatives", "3", "--scale", "5"]),
    "triplets": (
        "bert", "Model", triplets,
        ["--query-column=q", "--positive-column=p", "--negative-column=n", "--scale", "5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_is_the_mean_of_each_examples_squared_gradient(
    cli: Cli, make_model: ModelMaker, case: str, tmp_path: Path
) -> None:
    kind, head, make, flags = CASES[case]
    folder = make_model("m", kind, spread=0.15, **({"head": head} if head else {}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rows, scores = make()
    write_rows("d.jsonl", rows)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder)
    losses = [-float(score(model.eval()).detach()) for score in scores]
    stored = load_file(folder / "model.safetensors").keys()  # Marian's positions are computed
    expected = {name: one for name, one in reference(model, scores).items() if name in stored}
    for batch_size in (1, 3, 8):
        result = cli(
            "estimate-fisher", folder, "--data", "d.jsonl", *flags, "--batch-size", batch_size,
            "--out", "f", "--overwrite", "--json", "--quiet",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert_same(load_file(tmp_path / "f" / "diagonal.safetensors"), expected)
        summary = result.report["summary"]
        assert summary["labels"] == "empirical" and summary["examples"] == len(scores)
        assert summary["by_autograd"] == [] and not summary["one_example_at_a_time"]
        if case in ("pairs", "triplets"):
            assert summary["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            told = "pooler.dense.bias, pooler.dense.weight: no part of embedding"
            assert any(told in warning for warning in result.report["warnings"])
            assert any("taking their mean" in warning for warning in result.report["warnings"])


@pytest.mark.parametrize("case", ["targets", "translations", "pairs", "experts"])
def test_padding_is_in_no_input_moment(
    cli: Cli, make_model: ModelMaker, case: str, tmp_path: Path
) -> None:
    """Encoder, decoder and cross-attention have inputs of different lengths; a text is a row. To
    Switch's experts, each a layer in a list, any number of tokens is given, padding too."""
    kind, head, make, flags = CASES["targets" if case == "experts" else case]
    folder = make_model("m", kind, spread=0.15, **({"head": head} if head else {}))
    if case == "experts":
        config = transformers.SwitchTransformersConfig(
            vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            num_experts=4, num_sparse_encoder_layers=1, decoder_start_token_id=0,
        )  # fmt: skip
        switch: Any = transformers.SwitchTransformersForConditionalGeneration(config)
        randomize(switch)
        switch.save_pretrained(folder)
    write_rows("d.jsonl", make()[0])
    for batch_size, out in ((1, "one"), (8, "eight")):
        result = cli(
            "estimate-fisher", folder, "--data", "d.jsonl", *flags, "--kind", "activation",
            "--batch-size", batch_size, "--out", out,
        )  # fmt: skip
        assert result.code == 0, result.err
    one, eight = (load_file(tmp_path / out / "activation.safetensors") for out in ("one", "eight"))
    assert one.keys() == eight.keys() and len(one) > 5
    for name, value in one.items():
        torch.testing.assert_close(eight[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_sampled_labels_do_not_depend_on_the_batch_size(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    """Of words, which --labels auto draws from the model; and of documents, also their mean."""
    for case, labels in (("words", "auto"), ("pairs", "sampled"), ("pairs", "expected")):
        kind, head, make, flags = CASES[case]
        folder = make_model(case, kind, spread=0.15, head=head)
        write_rows("d.jsonl", make()[0])
        found = []
        for batch_size in (1, 8):
            result = cli(
                "estimate-fisher", folder, "--data", "d.jsonl", *flags, "--labels", labels,
                "--batch-size", batch_size, "--out", "f", "--overwrite", "--json",
            )  # fmt: skip
            assert result.code == 0, result.err
            found.append(load_file(tmp_path / "f" / "diagonal.safetensors"))
        wanted = "sampled" if labels == "auto" else labels
        assert result.report["summary"]["labels"] == wanted
        assert_same(found[1], {name: value.double() for name, value in found[0].items()}, 1e-4)


def test_a_bfloat16_embedding_model(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    """Scores are float32; the layers, and what is held against autograd, are not."""
    write_rows("d.jsonl", pairs()[0])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = make_model(f"{dtype}", head="Model", spread=0.15, dtype=dtype)
        flags = ("--scale", 1, "--json")  # no score is so sharp that rounding decides it
        result = cli("estimate-fisher", folder, "--data", "d.jsonl", *flags, "--out", f"f{dtype}")
        assert result.code == 0, result.err
        assert result.report["summary"]["by_autograd"] == []
        found.append(load_file(tmp_path / f"f{dtype}" / "diagonal.safetensors"))
    for name, value in found[0].items():
        if "word_embeddings" in name or "intermediate.dense.weight" in name:
            error = (found[1][name] - value).norm() / value.norm()
            assert error < 0.15, (name, error)


def test_long_texts_are_cut_and_counted(cli: Cli, make_model: ModelMaker) -> None:
    """Of every task, at the model's 32 positions or where the flag says."""
    long = make_text(0, 60)
    rows: dict[str, dict[str, Any]] = {
        "ForTokenClassification": {"text": long, "label": [0] * 60},
        "ForMaskedLM": {"text": long},
        "Model": {"query": "the cat", "positive": "a dog", "negative": [long, "a bird"]},
        "": {"text": "the cat", "target": long},
    }
    for head, row in rows.items():
        folder = make_model(
            f"m{head}", "bert" if head else "t5", **({"head": head} if head else {})
        )
        write_rows("d.jsonl", [row])
        flags = ("--data", "d.jsonl", "--out", f"f{head}", "--json", "--max-length", 40)
        result = cli("estimate-fisher", folder, *flags)
        assert result.code == 0, result.err
        assert result.report["calibration"]["truncated"] == 1
        assert result.report["calibration"]["max_length"] == 32


REFUSED = [
    ("ForTokenClassification", ["--labels", "expected"], 2, "token-classification is out of reach"),
    (
        "ForTokenClassification",
        ["--labels", "expected", "--dry-run"],
        2,
        "token-classification is out of reach",
    ),
    (
        "ForSequenceClassification",
        ["--kind", "activation", "--labels", "sampled"],
        2,
        "--kind activation is of forward passes alone",
    ),
    (
        "ForTokenClassification",
        ["--task", "embedding"],
        3,
        "BertForTokenClassification, which may not fit",
    ),
    ("ForTokenClassification", ["--task", "sequence-to-sequence"], 3, "does not fit --task seq"),
    ("ForTokenClassification", ["--scale", "3"], 2, "--scale is not for token-classification"),
    (
        "ForMaskedLM",
        ["--task", "token-classification"],
        3,
        "BertForMaskedLM, which may not fit --task tok",
    ),
    ("ForMaskedLM", ["--mask-fraction", "0"], 2, "--mask-fraction 0.0"),
    ("ForMaskedLM", ["--mask-prompt"], 2, "--mask-prompt is not for masked-lm"),
    ("Model", ["--task", "causal-lm"], 3, "BertModel, which may not fit --task causal-lm"),
    ("Model", ["--text-pair-column", "x"], 2, "--text-pair-column is not for embedding"),
    ("Model", [], 3, "no column 'query'; it has 'text', 'label'"),
]


@pytest.mark.parametrize(("head", "flags", "code", "told"), REFUSED)
def test_refusals(
    cli: Cli, make_model: ModelMaker, data: Path, head: str, flags: list[str], code: int, told: str
) -> None:
    model = make_model("m", head=head)
    result = cli("estimate-fisher", model, "--data", data, "--out", "f", *flags)
    assert (result.code, result.err.count("\n")) == (code, 1), result.err
    assert told in result.err
    assert not Path("f").exists()


@pytest.mark.parametrize("verb", [("estimate-fisher", "--out", "f"), ("evaluate",)])
def test_regression_is_refused_by_every_verb(
    cli: Cli, make_model: ModelMaker, data: Path, verb: tuple[str, ...]
) -> None:
    result = cli(*verb, make_model("m", labels=1), "--data", data)
    assert (result.code, result.err.count("\n")) == (3, 1), result.err
    assert "its head is for regression" in result.err


def test_what_is_not_measured_yet_is_refused(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    result = cli("evaluate", make_model("m", head="ForMaskedLM"), "--data", data)
    assert result.code == 2
    assert "is not measured yet; measured are sequence-classification, token" in result.err


def test_words_are_measured(cli: Cli, make_model: ModelMaker) -> None:
    rows, scores = labelled_words()
    folder = make_model("m", head="ForTokenClassification", spread=0.15)
    write_rows("d.jsonl", rows)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    summary = cli("evaluate", folder, "--data", "d.jsonl", "--json").report["summary"]
    words = sum(len(row["label"]) for row in rows)
    with torch.no_grad():
        loss = -sum(float(score(model)) for score in scores) / words
    assert summary["loss"] == pytest.approx(loss, rel=1e-5)
    assert 0 <= summary["accuracy"] <= 1


def test_left_over_tensors_of_the_right_architecture_are_not_laid_to_the_task(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    model = make_model("m")
    path = model / "model.safetensors"
    save_file(load_file(path) | {"more.weight": torch.ones(2)}, path, {"format": "pt"})
    result = cli("estimate-fisher", model, "--data", data, "--out", "f")
    assert result.code == 3
    assert result.err.endswith("more.weight; config.json may be that of other weights\n")
