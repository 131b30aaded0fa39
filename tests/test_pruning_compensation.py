"""Moves of the weights that stay, against explicit inverses and constrained minima in float64."""

import pytest
import torch
from torch import Tensor

from fishertool.fisher.columns import HeldGradients
from fishertool.fisher.rank_one import RankOneFisher
from fishertool.pruning.parts.columnwise import Choose, columnwise
from fishertool.pruning.parts.compensation import joint, summed
from fishertool.pruning.parts.masks import choose, parse_pattern

SHAPES: list[list[tuple[int, ...]]] = [[(1,)], [(2,)], [(9, 7)], [(4, 16)], [(5, 8), (10, 26)]]
BLOCKS = [None, 1, 8, 13, 64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepare(
    shapes: list[tuple[int, ...]], members: int, damping: float, block: int | None
) -> tuple[Tensor, Tensor, Tensor, RankOneFisher, HeldGradients]:
    """Weights, a mask, the dense F, and F as the bank has it."""
    tensors = {f"w{n}": normal(members, *shape, seed=n) for n, shape in enumerate(shapes)}
    gradients = HeldGradients(tensors)
    rows = torch.cat([one.reshape(members, -1) for one in tensors.values()], 1).double()
    size = rows.shape[1]
    places = torch.tensor([
        (n, weight // (block or 10**9) if block else 0)
        for n, one in enumerate(tensors.values())
        for weight in range(one[0].numel())
    ])  # fmt: skip
    if block is None:
        places = torch.zeros(size, 2)
    dense = (rows.T @ rows / members) * (places[:, None] == places).all(2)
    dense += damping * torch.eye(size, dtype=torch.float64)
    mask = normal(size, seed=11) > 0.2
    return normal(size, seed=10), mask, dense, RankOneFisher(gradients, damping, block), gradients


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("members", [1, 6, 64, 400])
def test_summed_adds_up_the_single_optima(
    shapes: list[tuple[int, ...]], block: int | None, members: int
) -> None:
    weight, mask, dense, fisher, _ = prepare(shapes, members, 0.03, block)
    inverse = torch.linalg.inv(dense)
    expected = weight.double()
    for q in (~mask).nonzero().flatten().tolist():
        expected = expected - weight[q].double() / inverse[q, q] * inverse[q]
    expected = torch.where(mask, expected, 0.0)
    torch.testing.assert_close(summed(weight, mask, fisher), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("members", [1, 6, 64, 400])
def test_joint_is_the_constrained_minimum(
    shapes: list[tuple[int, ...]], block: int | None, members: int
) -> None:
    weight, mask, dense, fisher, gradients = prepare(shapes, members, 0.03, block)
    before = weight.clone()
    found = joint(weight, mask, fisher, gradients)
    # The stationary point of the Lagrangian: F d + E l = 0 with E^T d = -w_Q.
    pruned = (~mask).nonzero().flatten()
    size, count = len(weight), len(pruned)
    system = torch.zeros(size + count, size + count, dtype=torch.float64)
    system[:size, :size] = dense
    system[pruned, range(size, size + count)] = 1
    system[range(size, size + count), pruned] = 1
    right = torch.zeros(size + count, dtype=torch.float64)
    right[size:] = -weight[pruned].double()
    expected = weight.double() + torch.linalg.solve(system, right)[:size]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert not found[~mask].any()
    assert torch.equal(weight, before)


def test_joint_beats_summed_and_nothing_on_the_quadratic_model() -> None:
    weight, mask, dense, fisher, gradients = prepare([(12, 25)], 64, 1e-3, None)
    losses = [
        float((new - weight.double()) @ dense @ (new - weight.double())) / 2
        for new in (
            joint(weight, mask, fisher, gradients),
            summed(weight, mask, fisher),
            torch.where(mask, weight.double(), 0.0),
        )
    ]
    assert losses[0] < 0.5 * min(losses[1:])


def test_joint_of_a_nearly_singular_fisher() -> None:
    """Damping 1e-7 of the mean, a whole matrix: the products lose eleven digits."""
    weight, mask, _, _, gradients = prepare([(12, 25)], 16, 1.0, None)
    fisher = RankOneFisher(gradients, 1e-7, relative=True)
    rows = gradients.read("w0", 0, 300).double()
    kept, pruned = rows[:, mask], rows[:, ~mask]
    small = fisher.damping * torch.eye(16, dtype=torch.float64) + kept @ kept.T / 16
    moves = kept.T @ torch.linalg.solve(small, pruned @ weight[~mask].double() / 16)
    found = joint(weight, mask, fisher, gradients)
    torch.testing.assert_close(found[mask], weight[mask].double() + moves, rtol=0, atol=1e-6)


def moment(width: int) -> Tensor:
    x = normal(3 * width, width, seed=3) @ normal(width, width, seed=4)
    return x.T @ x / (3 * width)


def recursion(
    weight: Tensor, activations: Tensor, choice: Choose, step: int
) -> tuple[Tensor, Tensor]:
    """SparseGPT with its inverse Hessians eliminated one column after another, row by row."""
    hessian = 2 * activations.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    values, mask = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    width = weight.shape[1]
    for start in range(0, width, step):
        stop = min(start + step, width)
        scales = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, stop)])
        saliency = (values[:, start:stop].square() / scales).float()
        mask[:, start:stop] = choice(saliency, start)
        for j in range(start, stop):
            inverse = torch.linalg.inv(hessian[j:, j:])
            for i in range(len(values)):
                if not mask[i, j]:
                    values[i, j:] -= values[i, j] / inverse[0, 0] * inverse[0]
                    values[i, j] = 0
    return values, mask


@pytest.mark.parametrize("width", [1, 2, 16, 63])
@pytest.mark.parametrize("step", [4, 100])
def test_columnwise_agrees_with_the_recursion(width: int, step: int) -> None:
    weight, activations = normal(6, width), moment(width)

    def choice(saliency: Tensor, start: int) -> Tensor:
        return choose(saliency, parse_pattern("unstructured"), 0.5)

    found = columnwise(weight, activations, choice, step)
    expected = recursion(weight, activations, choice, step)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    assert not found[0][~found[1]].any()


def test_columnwise_lowers_the_error_of_the_output() -> None:
    weight, activations = normal(20, 64), moment(64)
    pattern = parse_pattern("2:4")
    new, mask = columnwise(weight, activations, lambda s, start: choose(s, pattern, 0.5), 4)
    assert set(mask.reshape(20, 16, 4).sum(2).flatten().tolist()) == {2}

    def error(values: Tensor) -> float:
        change = values.double() - weight.double()
        return float((change @ activations.double() * change).sum())

    assert error(new) < 0.7 * error(weight * mask)
    assert error(new) < 0.7 * error(weight * choose(weight.abs(), pattern, 0.5))
