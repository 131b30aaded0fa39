"""`--select`: k-means against the definition, and which examples of a pool an estimate takes."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS, Cli, ModelMaker, make_text, write_rows
from test_estimate_workers import torchrun, weights_in
from test_sentence import make_sentence_model
from torch import Tensor

from fishertool.calibration.choice import at_random, kmeans
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.models.loading import load_model
from fishertool.models.sentence import transformer_folder
from fishertool.models.tasks import TASKS
from fishertool.models.vectors import vectors_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(each: int, spread: float = 0.01) -> Tensor:
    """Three groups of vectors, far apart, the groups taking turns."""
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    return centres.repeat(each, 1) + spread * torch.randn(3 * each, 2, generator=generator(1))


def test_finds_groups_that_are_far_apart() -> None:
    vectors = blobs(8)
    for seed in range(5):
        found = kmeans(vectors, 3, generator(seed))
        groups = found.members.reshape(8, 3)
        assert (groups == groups[0]).all() and len(set(groups[0].tolist())) == 3
        means = torch.stack([vectors[found.members == c].double().mean(0) for c in range(3)])
        torch.testing.assert_close(found.centres, means, rtol=1e-12, atol=1e-12)
        expected = [
            int(torch.where(found.members == c, (vectors - means[c]).norm(dim=1), 1e9).argmin())
            for c in range(3)
        ]
        assert found.nearest() == sorted(expected)
        inertia = sum(
            float((v - means[c]).square().sum())
            for v, c in zip(vectors, found.members, strict=True)
        )
        assert found.inertia == pytest.approx(inertia, rel=1e-9)


def test_a_fixed_point_of_lloyd_and_no_worse_than_chance() -> None:
    vectors = torch.randn(60, 4, generator=generator())
    found = kmeans(vectors, 7, generator(3), iterations=100)
    distances = torch.cdist(vectors.double(), found.centres).square()
    assert found.iterations < 100
    torch.testing.assert_close(distances.min(1).values, found.distances, rtol=1e-9, atol=1e-12)
    for c in range(7):
        mean = vectors[found.members == c].double().mean(0)
        torch.testing.assert_close(found.centres[c], mean, rtol=1e-9, atol=1e-12)
    random = torch.cdist(vectors, vectors[at_random(60, 7, generator(3))]).square().min(1).values
    assert found.inertia < float(random.sum())


def test_small_pools_have_the_best_clusters_of_all() -> None:
    """Of five starts one finds the optimum over every division into two."""
    vectors = torch.randn(7, 2, generator=generator(5))

    def inertia(division: tuple[int, ...]) -> float:
        parts = [vectors[[n for n in range(7) if division[n] == c]].double() for c in (0, 1)]
        return sum(float((part - part.mean(0)).square().sum()) for part in parts if len(part))

    best = min(map(inertia, itertools.product((0, 1), repeat=7)))
    found = min(kmeans(vectors, 2, generator(seed)).inertia for seed in range(5))
    assert found == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_copies_still_give_as_many_examples_as_asked_for(count: int) -> None:
    vectors = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2)
    found = kmeans(vectors, count, generator())
    assert sorted(set(found.members.tolist())) == list(range(count))
    assert len(set(found.nearest())) == count
    if count > 1:
        assert found.inertia == pytest.approx(0, abs=1e-12)


def test_more_clusters_than_vectors_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="3 clusters of 2 vectors"):
        kmeans(torch.eye(2), 3, generator())


def test_at_random_is_a_fair_choice_by_the_seed() -> None:
    assert at_random(9, 4, generator(1)) == at_random(9, 4, generator(1))
    counts = torch.zeros(5)
    for seed in range(400):
        chosen = at_random(5, 2, generator(seed))
        assert chosen == sorted(set(chosen)) and len(chosen) == 2
        counts[chosen] += 1
    assert ((counts - 160).abs() < 40).all()  # four standard deviations


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("size", [1, 4, None])
def test_vectors_are_the_mean_of_the_last_hidden_state(
    make_model: ModelMaker, kind: str, size: int | None
) -> None:
    folder = make_model("m", kind, spread=0.15)
    names = {"bert": "sequence-classification", "gpt2": "causal-lm", "t5": "sequence-to-sequence"}
    with open_checkpoint(folder) as checkpoint:
        loaded = load_model(checkpoint, TASKS[names[kind]])
    texts: list[dict[str, list[int]]] = [{"input_ids": [4 + n] * (1 + n)} for n in range(5)]
    if kind == "t5":
        texts = [text | {"labels": [5, 6]} for text in texts]
    found = vectors_of(loaded, texts, size)
    classes = {"bert": "BertModel", "gpt2": "GPT2Model", "t5": "T5EncoderModel"}
    plain = getattr(transformers, classes[kind]).from_pretrained(folder).eval()
    for vector, text in zip(found, texts, strict=True):
        with torch.no_grad():
            hidden = plain(torch.tensor([text["input_ids"]])).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_vectors_of_an_embedding_model_are_its_own(make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model, {"pooling_mode_cls_token": True})
    with open_checkpoint(transformer_folder(folder)) as checkpoint:
        loaded = load_model(checkpoint, TASKS["embedding"])
    [vector] = vectors_of(loaded, [{"input_ids": [2, 5, 3]}])
    with torch.no_grad():
        first = loaded.pretrained(torch.tensor([[2, 5, 3]])).last_hidden_state[0, 0]
    torch.testing.assert_close(vector, first / first.norm(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Twelve texts: four copies each of three, each time with another label."""
    path = tmp_path / "pool.jsonl"
    rows = [{"text": WORDS[4 * (n % 3)] + " runs", "label": n // 4} for n in range(12)]
    write_rows(path, rows)
    return path


def estimated(cli: Cli, out: str, *flags: object) -> dict[str, Any]:
    result = cli("estimate-fisher", *flags, "--out", out, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = result.report["calibration"]
    return found


def test_kmeans_takes_one_of_each_kind(cli: Cli, make_model: ModelMaker, pool: Path) -> None:
    model = make_model("a", spread=0.15)
    run = (model, "--data", pool, "--num-examples", 3, "--labels", "empirical")
    found = estimated(cli, "f", *run, "--select", "kmeans")
    inertia = found["selection"].pop("inertia")
    assert inertia == pytest.approx(0, abs=1e-9)
    assert found["selection"] == {"method": "kmeans", "pool": 12, "seed": 0, "iterations": 1}
    write_rows("first.jsonl", [json.loads(line) for line in pool.read_text().splitlines()][:3])
    first = estimated(cli, "g", model, "--data", "first.jsonl", "--labels", "empirical")
    assert found["token_ids_sha256"] == first["token_ids_sha256"]  # of equal ones the first


def test_a_pool_of_some_and_a_choice_by_the_seed(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model, texts = make_model("g", "gpt2"), tmp_path / "texts.jsonl"
    write_rows(texts, [{"text": make_text(n, 4 + n % 5)} for n in range(30)])
    run = (model, "--data", texts, "--num-examples", 5, "--include", "*ln_f*")
    for way in ("random", "kmeans"):
        one = estimated(cli, f"{way}-1", *run, "--select", way, "--select-from", 20)
        assert (one["examples"], one["selection"]["pool"]) == (5, 20)
        again = estimated(cli, f"{way}-2", *run, "--select", way, "--select-from", 20)
        other = estimated(cli, f"{way}-3", *run, "--select", way, "--seed", 1)
        assert one == again
        assert other["selection"]["pool"] == 30
        assert one["token_ids_sha256"] != other["token_ids_sha256"]
        assert weights_in(tmp_path / f"{way}-1") == weights_in(tmp_path / f"{way}-2")


def test_parts_and_processes_choose_the_same(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model, texts = make_model("g", "gpt2"), tmp_path / "texts.jsonl"
    write_rows(texts, [{"text": make_text(n, 4 + n % 5)} for n in range(30)])
    run = ("estimate-fisher", model, "--data", texts, "--num-examples", 6, "--select", "kmeans")
    assert cli(*run, "--out", "whole").code == 0
    for n in (1, 2):
        assert cli(*run, "--part", f"{n}/2", "--out", f"p{n}").code == 0
    assert cli("combine-fisher", "p1", "p2", "--out", "sum").code == 0
    done = torchrun(2, *run, "--threads", 1, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("sum", "two"):
        assert weights_in(tmp_path / name) == weights_in(tmp_path / "whole")


def test_queries_are_chosen_with_their_documents(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_model("e", head="Model", spread=0.15)
    rows = [{"query": WORDS[n % 2], "positive": make_text(n, 3)} for n in range(6)]
    write_rows("d.jsonl", rows)
    flags = (folder, "--data", "d.jsonl", "--num-examples", 2)
    found = estimated(cli, "f", *flags, "--select", "kmeans")
    assert found["examples"] == 2
    assert found["tokens"] > 6 * 3  # all documents of the block stay


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--select", "kmean"), 2, "--select 'kmean': is one of random, kmeans"),
        (("--select", "kmeans"), 2, "--select kmeans: give --num-examples"),
        (("--select-from", 5), 2, "--select-from is the pool of --select"),
        (
            ("--select", "random", "--num-examples", 5, "--select-from", 4),
            2,
            "--select-from 4: is a pool to take --num-examples 5 from",
        ),
        (
            ("--select", "kmeans", "--num-examples", 13),
            3,
            "pool.jsonl: --select takes --num-examples 13 of a pool of 12",
        ),
    ],
)
def test_what_cannot_be_selected(
    cli: Cli, make_model: ModelMaker, pool: Path, flags: tuple[object, ...], code: int, told: str
) -> None:
    result = cli("estimate-fisher", make_model("a"), "--data", pool, *flags, "--out", "f")
    assert (result.code, told in result.err) == (code, True), result.err
