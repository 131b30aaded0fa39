"""Cotangents on the logits: their outer products are the Fisher of the logits, diag(p) - p p^T."""

import types
from collections.abc import Sequence

import pytest
import torch
from test_fisher_diagonal import estimate_diagonal
from torch import Tensor, nn

from fishertool.fisher.batches import Batch
from fishertool.fisher.labels import (
    Labels,
    empirical,
    expected,
    expected_signed,
    log_probabilities,
    sampled,
)

LOGITS = {
    "random": lambda classes: 2 * torch.randn(5, classes, generator=_generator()),
    "near-certain": lambda classes: torch.eye(classes)[:1] * 40.0,
    "impossible": lambda classes: torch.tensor([[-torch.inf] + [0.3] * (classes - 1)]),
    "uniform": lambda classes: torch.zeros(1, classes),
}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _covariance(p: Tensor) -> Tensor:
    """diag(p) - p p^T, with 1 - p as the sum of the other classes: nothing cancels."""
    others = p @ (1 - torch.eye(p.shape[-1], dtype=p.dtype))
    products = p.unsqueeze(-1) * p.unsqueeze(-2)
    on_diagonal = torch.eye(p.shape[-1], dtype=torch.bool)
    return torch.where(on_diagonal, torch.diag_embed(p * others), -products)


class TinyLM(nn.Module):
    """Five words, four features, no context: [example, time] -> [example, time, word]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.out(torch.tanh(self.embed(ids))))


@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("kind", LOGITS)
def test_expected_is_the_exact_mean_over_classes(kind: str, classes: int) -> None:
    log_p = torch.log_softmax(LOGITS[kind](classes).double(), -1)
    cotangents = list(expected(log_p))
    assert len(cotangents) == classes - 1
    outer = sum((v.unsqueeze(-1) * v.unsqueeze(-2) for v in cotangents), torch.zeros(()))
    torch.testing.assert_close(outer, _covariance(log_p.exp()), rtol=1e-9, atol=1e-30)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("kind", LOGITS)
def test_expected_signed_averages_to_the_exact_mean(
    kind: str, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all sign vectors, each once: no statistics are needed."""
    classes = 4
    log_p = torch.log_softmax(LOGITS[kind](classes).double(), -1)
    vectors = torch.cartesian_prod(*[torch.tensor([-1, 1], dtype=torch.int8)] * classes)
    scored = torch.ones(len(log_p), dtype=torch.bool)
    total = torch.zeros(len(log_p), classes, classes, dtype=torch.float64)
    for vector in vectors:
        monkeypatch.setattr(
            "fishertool.fisher.labels.random_signs", lambda shape, _, v=vector: v.expand(*shape)
        )
        for v in expected_signed(log_p, scored, range(len(log_p)), draws):
            total += v.unsqueeze(-1) * v.unsqueeze(-2)
    torch.testing.assert_close(
        total / len(vectors), _covariance(log_p.exp()), rtol=1e-9, atol=1e-15
    )


def test_expected_signed_does_not_depend_on_batching_and_skips_what_is_not_scored() -> None:
    log_p = torch.log_softmax(torch.randn(3, 4, 5, generator=_generator()), -1)
    scored = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    [together] = expected_signed(log_p, scored, [7, 8, 9], 1)
    assert not together[~scored].any() and together[scored].any(-1).all()
    for n in range(3):
        [alone] = expected_signed(log_p[n : n + 1], scored[n : n + 1], [7 + n], 1)
        assert torch.equal(alone[0], together[n])
    [other] = expected_signed(log_p, scored, [1, 2, 3], 1)
    assert not torch.equal(other, together)
    torch.testing.assert_close(together.sum(-1), torch.zeros(3, 4), rtol=0, atol=1e-6)


def test_expected_keeps_the_digits_of_a_near_certain_class_in_float32() -> None:
    log_p = torch.log_softmax(torch.tensor([[25.0, 0.0, 1.0]]), -1)
    variance = sum((v.double().square() for v in expected(log_p)), torch.zeros(()))
    exact = _covariance(log_p.double().exp()).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, exact, rtol=1e-4, atol=0)


def test_empirical_is_the_gradient_of_the_target_log_probability() -> None:
    logits = torch.randn(4, 6, 5, dtype=torch.float64, generator=_generator(), requires_grad=True)
    targets = torch.randint(5, (4, 6), generator=_generator())
    scored = torch.rand(4, 6, generator=_generator()) < 0.6
    score = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    [gradient] = torch.autograd.grad(score[scored].sum(), [logits])
    found = empirical(log_probabilities(logits), targets, scored)
    assert 0 < int(scored.sum()) < scored.numel()
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    assert not found[~scored].any()


def test_log_probabilities_are_detached_and_at_least_float32() -> None:
    logits = torch.randn(2, 3, generator=_generator()).requires_grad_()
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        log_p = log_probabilities(logits.to(dtype))
        assert log_p.dtype == wide and not log_p.requires_grad
        torch.testing.assert_close(log_p, torch.log_softmax(logits.detach().to(dtype).to(wide), -1))


def _drawn(log_p: Tensor, scored: Tensor, seeds: Sequence[int], draws: int) -> Tensor:
    """The labels behind `sampled`'s cotangents: [draw, example, time]."""
    cotangents = torch.stack(list(sampled(log_p, scored, seeds, draws)))
    labels: Tensor = (cotangents * draws**0.5 + log_p.exp() * scored.unsqueeze(-1)).argmax(-1)
    return labels


def test_sampled_follows_the_seed_and_not_the_batch_or_the_padding() -> None:
    log_p = torch.log_softmax(torch.randn(3, 40, 6, generator=_generator()), -1)
    scored = torch.ones(3, 40, dtype=torch.bool)
    labels = _drawn(log_p, scored, [1, 2, 3], 4)
    assert torch.equal(labels, _drawn(log_p, scored, [1, 2, 3], 4))
    order = [2, 0, 1]
    moved = _drawn(log_p[order], scored, [3, 1, 2], 4)
    assert torch.equal(moved, labels[:, order])
    noise = torch.full((3, 7, 6), 6.0).reciprocal().log()
    padded = torch.cat([log_p, noise], 1)
    more = torch.cat([scored, torch.zeros(3, 7, dtype=torch.bool)], 1)
    assert torch.equal(_drawn(padded, more, [1, 2, 3], 4)[:, :, :40], labels)
    assert not torch.equal(_drawn(log_p, scored, [4, 2, 3], 4)[:, 0], labels[:, 0])
    same_p = _drawn(log_p[:1].expand(3, -1, -1), scored, [1, 2, 3], 4)
    assert not torch.equal(same_p[:, 0], same_p[:, 1])  # examples draw independently,
    assert not torch.equal(labels[0], labels[1])  # and so do draws


@pytest.mark.parametrize("draws", [1, 4])
def test_sampled_cotangents_are_those_of_their_labels_over_the_root_of_draws(draws: int) -> None:
    log_p = torch.log_softmax(torch.randn(2, 3, 4, generator=_generator()).double(), -1)
    scored = torch.tensor([[True, True, False], [True, False, False]])
    labels = _drawn(log_p, scored, [1, 2], draws)
    for cotangent, targets in zip(sampled(log_p, scored, [1, 2], draws), labels, strict=True):
        onehot = torch.nn.functional.one_hot(targets, 4).double()
        wanted = (onehot - log_p.exp()) / draws**0.5 * scored.unsqueeze(-1)
        torch.testing.assert_close(cotangent, wanted, rtol=1e-12, atol=1e-14)


def test_sampled_labels_have_the_models_frequencies() -> None:
    count = 20_000
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    log_p = p.log().expand(1, count, 5)
    [labels] = _drawn(log_p.clone(), torch.ones(1, count, dtype=torch.bool), [0], 1)
    frequencies = torch.bincount(labels[0], minlength=5) / count
    assert frequencies[1] == 0
    sigma = (p * (1 - p) / count).sqrt()
    assert ((frequencies - p).abs() <= 4 * sigma).all()


def _sequences() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[0, 1, 2, 3], [4, 1, 1, 0], [2, 4, 3, 3]])
    return ids, torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def _sampled_diagonal(draws: int, labels: Labels = "sampled") -> dict[str, Tensor]:
    ids, scored = _sequences()

    def batch(indices: Sequence[int]) -> Batch:
        chosen = list(indices)
        return Batch({"ids": ids[chosen, :-1]}, ids[chosen, 1:], scored[chosen], chosen)

    model = TinyLM()
    parameters = dict(model.named_parameters())
    return estimate_diagonal(
        model, parameters, batch, range(3), 3, labels=labels, draws=draws
    ).diagonal


def test_the_mean_of_sampled_tends_to_the_sum_over_positions_of_the_expectation() -> None:
    """Labels of different positions are independent, so their cross terms vanish on average."""
    ids, scored = _sequences()
    model = TinyLM().double()
    parameters = dict(model.named_parameters())
    exact = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    log_p = torch.log_softmax(model(ids[:, :-1]).logits, -1)
    for n, time in scored.nonzero().tolist():
        for value in log_p[n, time]:
            gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                exact[name] += value.detach().exp() * gradient**2 / len(ids)
    errors = []
    for draws in (60, 1500):
        found = _sampled_diagonal(draws)
        errors.append(max(_error(found[name], exact[name]) for name in exact))
    assert errors[1] < 0.05 < 2 * errors[0]  # at 1500 within a few per cent; it falls with draws
    assert errors[1] < 0.5 * errors[0]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
