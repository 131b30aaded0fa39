"""`evaluate --task embedding`: retrieval, similarity and loss, against the definitions."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, make_text, write_rows
from safetensors.torch import load_file, save_file
from test_sentence import make_sentence_model
from torch import Tensor

from fishertool.evaluation.retrieval import ndcg, ranks_of_relevant, reciprocal_rank


@pytest.mark.parametrize(
    ("scores", "relevant", "ranks"),
    [
        ([0.9, 0.5, 0.1], [0], [1]),
        ([0.9, 0.5, 0.1], [2], [3]),
        ([0.1, 0.9, 0.5, 0.7], [0, 3], [2, 4]),
        ([0.5, 0.5, 0.5, 0.5], [1], [4]),  # nothing is gained by being undecided
        ([0.5, 0.5, 0.5, 0.9], [0, 1], [3, 4]),
        ([0.3], [0], [1]),
    ],
)
def test_ranks(scores: list[float], relevant: list[int], ranks: list[int]) -> None:
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[relevant] = True
    assert ranks_of_relevant(torch.tensor(scores), chosen).tolist() == ranks


def test_ndcg_by_hand() -> None:
    log2 = math.log2
    assert ndcg(torch.tensor([1])) == 1
    assert ndcg(torch.tensor([3])) == pytest.approx(1 / log2(4))
    assert ndcg(torch.tensor([10])) == pytest.approx(1 / log2(11))
    assert ndcg(torch.tensor([11])) == 0
    best = 1 + 1 / log2(3) + 1 / log2(4)
    assert ndcg(torch.tensor([2, 5, 30])) == pytest.approx((1 / log2(3) + 1 / log2(6)) / best)
    assert ndcg(torch.arange(1, 15)) == pytest.approx(1)  # more than fit in the first ten
    assert ndcg(torch.tensor([1, 4]), cutoff=3) == pytest.approx(1 / (1 + 1 / log2(3)))
    assert reciprocal_rank(torch.tensor([4, 5])) == 0.25


def cosines(folder: Path, firsts: list[str], seconds: list[str]) -> Tensor:
    """[first, second], float64; every text alone, the mean of its tokens."""
    model = transformers.AutoModel.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def vectors(texts: list[str]) -> Tensor:
        rows = []
        for text in texts:
            with torch.no_grad():
                inputs = tokenizer(text, return_tensors="pt")
                rows.append(model(**inputs).last_hidden_state[0].mean(0))
        return torch.nn.functional.normalize(torch.stack(rows))

    return vectors(firsts) @ vectors(seconds).T


ROWS: list[dict[str, Any]] = [
    {
        "query": make_text(n if n else 1, 3),  # rows 0 and 1 ask the same
        "positive": make_text(20 + n, 5),
        "negative": [make_text(40 + n // 2, 4), make_text(60 + n, 6)],  # every other is the same
    }
    for n in range(14)
]


def expected_retrieval(folder: Path) -> dict[str, float]:
    corpus = sorted({text for row in ROWS for text in (row["positive"], *row["negative"])})
    positives: dict[str, set[str]] = {}
    for row in ROWS:
        positives.setdefault(row["query"], set()).add(row["positive"])
    queries = list(positives)
    gains, reciprocals = [], []
    for query, scores in zip(queries, cosines(folder, queries, corpus), strict=True):
        order = [corpus[n] for n in scores.argsort(descending=True).tolist()]
        hits = [document in positives[query] for document in order]
        gained = sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits[:10]))
        most = sum(1 / math.log2(rank + 2) for rank in range(len(positives[query])))
        gains.append(gained / most)
        reciprocals.append(1 / (1 + hits.index(True)))
    return {"ndcg_at_10": statistics.mean(gains), "mrr": statistics.mean(reciprocals)}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_retrieval_and_loss(cli: Cli, make_model: ModelMaker, batch_size: int) -> None:
    folder = make_sentence_model(make_model)
    write_rows("d.jsonl", ROWS)
    flags = ("--data", "d.jsonl", "--scale", 7, "--batch-size", batch_size, "--json")
    result = cli("evaluate", folder, *flags)
    assert result.code == 0, result.err
    found = result.report["summary"]
    assert found["examples"] == 14
    wanted = expected_retrieval(folder)
    assert 0 < wanted["ndcg_at_10"] < 1 and len({row["query"] for row in ROWS}) == 13
    losses = []
    for row in ROWS:
        scores = 7 * cosines(folder, [row["query"]], [row["positive"], *row["negative"]])
        losses.append(-float(torch.log_softmax(scores[0], 0)[0]))
    wanted["loss"] = statistics.mean(losses)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert "equal scores counted against the model" in result.report["evaluation"]["convention"]


def test_the_loss_is_the_estimators(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model)
    write_rows("d.jsonl", [{key: row[key] for key in ("query", "positive")} for row in ROWS])
    flags = ("--data", "d.jsonl", "--in-batch-negatives", 5, "--json")
    measured = cli("evaluate", folder, *flags).report["summary"]
    estimated = cli("estimate-fisher", folder, *flags, "--out", "f").report["summary"]
    assert measured["loss"] == pytest.approx(estimated["loss"], rel=1e-5)


PAIRS: list[dict[str, Any]] = [
    {"a": make_text(n, 3), "b": make_text(30 + n, 4), "score": (n * 7 % 10) // 2} for n in range(10)
]


def test_similarity_of_sentences(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model)
    write_rows("d.jsonl", PAIRS)
    flags = ("--text-column", "a", "--text-pair-column", "b", "--score-column", "score", "--json")
    result = cli("evaluate", folder, "--data", "d.jsonl", *flags)
    assert result.code == 0, result.err
    found = result.report["summary"]
    similar = cosines(folder, [p["a"] for p in PAIRS], [p["b"] for p in PAIRS]).diagonal()

    def ranks(values: list[float]) -> list[float]:
        return [
            statistics.mean(n + 1 for n, other in enumerate(sorted(values)) if other == value)
            for value in values
        ]

    wanted = statistics.correlation(
        ranks(similar.tolist()), ranks([float(pair["score"]) for pair in PAIRS])
    )
    assert found["sts_spearman"] == pytest.approx(wanted, abs=1e-9)
    assert "loss" not in found and "ndcg_at_10" not in found


def test_equal_scores_have_no_correlation(cli: Cli, make_model: ModelMaker) -> None:
    write_rows("d.jsonl", [{**pair, "score": 1} for pair in PAIRS])
    flags = ("--text-column", "a", "--text-pair-column", "b", "--score-column", "score", "--json")
    gate = ("--min", "sts_spearman=-1")
    result = cli("evaluate", make_sentence_model(make_model), "--data", "d.jsonl", *flags, *gate)
    assert result.code == 4
    assert result.report["summary"]["sts_spearman"] is None


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_against_another_model(cli: Cli, make_model: ModelMaker, transformer: str) -> None:
    folder = make_sentence_model(make_model, transformer=transformer)
    other = make_model("plain", head="Model", seed=3, spread=0.15)
    write_rows("d.jsonl", ROWS)
    flags = ("--data", "d.jsonl", "--json", "--max-drop", "ndcg_at_10=1", "--min", "mrr=0")
    result = cli("evaluate", other, "--against", folder, *flags)
    assert result.code == 0, result.err
    mine, theirs = result.report["summary"], result.report["evaluation"]["against"]
    drops = [
        gate["value"] for gate in result.report["evaluation"]["gates"] if "drop" in gate["rule"]
    ]
    assert drops == [pytest.approx(theirs["ndcg_at_10"] - mine["ndcg_at_10"])]
    texts = [row["query"] for row in ROWS[1:]]
    texts += sorted({text for row in ROWS for text in (row["positive"], *row["negative"])})
    vectors = {}
    for name in (folder / transformer, other):
        model = transformers.AutoModel.from_pretrained(name).double().eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        with torch.no_grad():
            vectors[name] = [
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
                for text in texts
            ]
    one, two = vectors.values()
    wanted = statistics.mean(
        float(torch.cosine_similarity(a, b, 0)) for a, b in zip(one, two, strict=True)
    )
    assert mine["mean_cosine"] == pytest.approx(wanted, rel=1e-5)
    itself = cli("evaluate", other, "--against", other, *flags, "--min", "mean_cosine=0.99999")
    assert itself.code == 0
    assert itself.report["summary"]["mean_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scored", [False, True])
def test_vectors_that_are_not_finite(cli: Cli, make_model: ModelMaker, scored: bool) -> None:
    folder = make_sentence_model(make_model)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][4] = math.nan  # that of one word
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_rows("d.jsonl", PAIRS if scored else ROWS)
    flags = ("--text-column", "a", "--text-pair-column", "b", "--score-column", "score")
    gate = "sts_spearman=-1" if scored else "mrr=0"
    result = cli(
        "evaluate", folder, "--data", "d.jsonl", *(flags if scored else ()), "--min", gate, "--json"
    )
    assert result.code == 4, result.err
    assert {*result.report["summary"].values()} == {
        None, len(PAIRS if scored else ROWS), result.report["summary"]["tokens"],
    }  # fmt: skip


def test_what_the_loader_warns_of_is_told_once(cli: Cli, make_model: ModelMaker) -> None:
    folder, plain = make_sentence_model(make_model), make_model("plain", head="Model")
    prompts = {"prompts": {"query": "find: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    write_rows("d.jsonl", ROWS)
    flags = ("--data", "d.jsonl", "--json", "--against")
    for other in (folder, plain):
        warnings = cli("evaluate", folder, *flags, other).report["warnings"]
        assert [told for told in warnings if "prompts" in told] == [
            "the model's prompts (query) are not added; where it wants them, put them into the data"
        ]
        assert any("plain: no modules.json" in told for told in warnings) == (other is plain)


def test_gates(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model)
    write_rows("d.jsonl", ROWS)
    assert cli("evaluate", folder, "--data", "d.jsonl", "--min", "ndcg_at_10=0").code == 0
    assert cli("evaluate", folder, "--data", "d.jsonl", "--min", "ndcg_at_10=1.1").code == 4


@pytest.mark.parametrize(
    ("rows", "flags", "code", "told"),
    [
        (ROWS, ("--min", "ndcg_10=1"), 2, "did you mean 'ndcg_at_10'?"),
        (ROWS, ("--min", "mean_cosine=1"), 2, "measured against a second model; give --against"),
        (ROWS, ("--text-column", "a"), 2, "--text-column is not for embedding"),
        (ROWS, ("--score-column", "s"), 2, "two sentences in --text-column and --text-pair-column"),
        (
            ROWS[:1],
            ("--query-column", "q"),
            3,
            "no column 'q'; it has 'query', 'positive', 'negative'",
        ),
        (
            [{"text": "a cat", "other": "a dog", "s": "alike"}],
            ("--text-pair-column", "other", "--score-column", "s"),
            3,
            "d.jsonl: row 0: its s is 'alike', not a number",
        ),
        (
            [{"text": "a cat", "other": " ", "s": 1}],
            ("--text-pair-column", "other", "--score-column", "s"),
            3,
            "no rows with text",
        ),
    ],
)
def test_what_is_refused(
    cli: Cli, make_model: ModelMaker, rows: Any, flags: tuple[str, ...], code: int, told: str
) -> None:
    write_rows("d.jsonl", rows)
    result = cli("evaluate", make_sentence_model(make_model), "--data", "d.jsonl", *flags)
    assert (result.code, told in result.err) == (code, True), result.err


def test_flags_of_embeddings_are_for_embeddings(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    model = make_model("a")
    for flag in ("--query-column", "--score-column"):
        result = cli("evaluate", model, "--data", data, flag, "x")
        assert (result.code, f"{flag} is not for" in result.err) == (2, True), result.err


def test_vectors_of_other_dimensions(cli: Cli, make_model: ModelMaker) -> None:
    write_rows("d.jsonl", ROWS)
    plain = make_model("m", head="Model")
    folder = make_sentence_model(make_model, {"pooling_mode": ["mean", "cls"]})
    flags = ("--data", "d.jsonl", "--task", "embedding")
    result = cli("evaluate", folder, "--against", plain, *flags)
    assert (result.code, "have 32 and 16 dimensions" in result.err) == (3, True), result.err


def test_the_real_model_finds_what_it_is_asked_for(cli: Cli, real_model: Path) -> None:
    gates = ("--min", "ndcg_at_10=0.95", "--min", "mrr=0.95", "--max", "loss=1")
    result = cli("evaluate", real_model, "--data", "pairs.jsonl", *gates, "--json")
    assert result.code == 0, result.err or result.report["summary"]
