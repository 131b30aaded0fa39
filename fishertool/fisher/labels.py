"""Which label's gradient is squared: cotangents on the logits whose outer products average to the Fisher.

For p = softmax(z), the gradient of log p(y) with respect to z is onehot(y) - p. A backward pass
from that cotangent gives the gradient with respect to the weights; scaling it by s scales the
square by s^2, which is how expectations are taken.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Labels = Literal["empirical", "sampled", "expected", "expected-signed"]
DRAWN = ("sampled", "expected-signed")
"""Those that are drawn, once or several times."""
Rule = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Iterable[Tensor]]
"""`log_p`, `targets` and `scored` as for `empirical`, and which examples they are: cotangents."""

SEED_STRIDE = 1_000_003
"""Example n of a run with some seed draws from a generator seeded with seed * SEED_STRIDE + n."""


def rule(labels: Labels, draws: int, seed: int) -> Rule:
    """How labels of this kind are taken, `draws` and `seed` being for those that are drawn."""
    if labels == "empirical":
        return lambda log_p, targets, scored, examples: [empirical(log_p, targets, scored)]
    if labels == "expected":
        return lambda log_p, targets, scored, examples: expected(log_p)
    drawn = sampled if labels == "sampled" else expected_signed

    def draw(
        log_p: Tensor, targets: Tensor, scored: Tensor, examples: Sequence[int]
    ) -> Iterable[Tensor]:
        seeds = [seed * SEED_STRIDE + example for example in examples]
        return drawn(log_p, scored, seeds, draws)

    return draw


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in float32 or wider."""
    return torch.log_softmax(
        logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), -1
    )


def empirical(log_p: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Cotangent onehot(target) - p, zero where not scored.

    Shapes: `log_p` [..., class], `targets` and `scored` [...]; the result as `log_p`.
    """
    cotangent = log_p.exp().neg_()
    cotangent.scatter_add_(
        -1, targets.unsqueeze(-1), cotangent.new_ones(()).expand(*targets.shape, 1)
    )
    return cotangent.mul_(scored.unsqueeze(-1))


def sampled(log_p: Tensor, scored: Tensor, seeds: Sequence[int], draws: int) -> Iterator[Tensor]:
    """`draws` cotangents, each with labels drawn from the model, scaled by 1 / sqrt(draws).

    Every example has its own generator, and unscored positions take no draw from it, so the
    labels do not depend on batching or padding. Shapes: `log_p` [example, ..., class], `scored`
    [example, ...].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(draws):
        targets = torch.zeros(scored.shape, dtype=torch.long, device=log_p.device)
        for n, generator in enumerate(generators):
            targets[n][scored[n]] = _draw(log_p[n][scored[n]], generator)
        yield empirical(log_p, targets, scored).div_(draws**0.5)


def expected(log_p: Tensor) -> Iterator[Tensor]:
    """C - 1 cotangents whose outer products sum to diag(p) - p p^T, the exact mean over C classes.

    They are the columns of its Cholesky factor, known in closed form: with the classes in order
    of rising probability and r_k = p_k + ... + p_C,

        column k = sqrt(p_k / (r_k r_k+1)) * (0, ..., 0, r_k+1, -p_k+1, ..., -p_C)

    so one backward pass is saved, and the tail r stays away from zero. Shapes: [example, class].
    """
    log_p, order = log_p.sort(-1)
    p = log_p.exp()
    tail = p.flip(-1).cumsum(-1).flip(-1)
    for k in range(p.shape[-1] - 1):
        rest = tail[:, k + 1]
        column = torch.zeros_like(p)
        column[:, k] = rest
        column[:, k + 1 :] = -p[:, k + 1 :]
        column *= (p[:, k] / (tail[:, k] * rest)).sqrt().unsqueeze(-1)
        yield torch.zeros_like(p).scatter_(-1, order, column)


def expected_signed(
    log_p: Tensor, scored: Tensor, seeds: Sequence[int], draws: int
) -> Iterator[Tensor]:
    """`draws` cotangents whose outer products average to the exact mean over classes.

    With s a vector of random signs, one a class, and independent at every position,

        v = sqrt(p) * s - p (sqrt(p) . s)        E[v v^T] = diag(p) - p p^T

    because v = M s for M = diag(sqrt p) - p sqrt(p)^T, and M M^T is that matrix. Its noise is
    less than a drawn label's, at the same one backward pass. Seeds, shapes and scale as `sampled`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    roots = (log_p / 2).exp()
    for _ in range(draws):
        signs = torch.zeros_like(log_p)
        for n, generator in enumerate(generators):
            here = scored[n]
            shape = log_p[n][here].shape
            signs[n][here] = random_signs(shape, generator).to(signs)
        along = (roots * signs).sum(-1, keepdim=True)
        yield (signs - roots * along).mul_(roots).div_(draws**0.5)


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """-1 or 1, int8."""
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1


def _draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """One class a row, by inverting the cumulative distribution in float64."""
    cumulative = log_p.double().exp().cumsum(-1)
    uniform = torch.rand(len(log_p), 1, dtype=torch.float64, generator=generator)
    point = uniform.to(log_p.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point).squeeze(-1).clamp_(max=log_p.shape[-1] - 1)
