"""The rank-one Fisher against dense float64 matrices, and against the recursion of M-FAC."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fishertool.errors import InputError
from fishertool.fisher import columns
from fishertool.fisher.columns import HeldGradients
from fishertool.fisher.rank_one import RankOneFisher, cholesky

DAMPING = 0.1
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one": [(1,)],
    "two": [(2,)],
    "63": [(9, 7)],
    "64": [(4, 16)],
    "several": [(5,), (), (8, 8), (3, 11), (2, 3, 4)],
}
BLOCKS = [None, 1, 2, 7, 8, 16, 64, 1000]


def draw(members: int, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{n}": torch.randn(members, *shape, generator=generator) for n, shape in enumerate(shapes)
    }


def matrix(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), -1).double() for g in gradients.values()], 1)


def dense(gradients: dict[str, Tensor], damping: float, block: int | None) -> Tensor:
    """From the definition: the mean of outer products, kept where two weights share a block."""
    rows = matrix(gradients)
    size = rows.shape[1]
    fisher = damping * torch.eye(size, dtype=torch.float64)
    for row in rows:
        fisher += row.outer(row) / len(rows)
    if block is None:
        return fisher
    blocks = torch.tensor(
        [
            (n, weight // block)
            for n, gradient in enumerate(gradients.values())
            for weight in range(gradient[0].numel())
        ]
    )
    return fisher * (blocks[:, None] == blocks).all(2)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def vectors(size: int, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, columns, dtype=torch.float64, generator=generator)


@pytest.fixture(params=[1, 40, 1 << 18])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one column or block, of some, and of all."""
    monkeypatch.setattr(columns, "PIECE_ELEMENTS", request.param)
    monkeypatch.setattr(columns, "READ_ELEMENTS", 3 * request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("members", [1, 7, 8, 64, 130])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_agrees_with_the_dense_matrix(shapes: list[tuple[int, ...]], members: int) -> None:
    gradients = draw(members, shapes)
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    x = vectors(matrix(gradients).shape[1])
    kept = x.clone()
    for block in BLOCKS:
        expected = dense(gradients, DAMPING, block)
        inverse = torch.linalg.inv(expected)
        fisher = RankOneFisher(HeldGradients(gradients), DAMPING, block)
        assert error(fisher.diagonal(), expected.diagonal()) < 1e-13
        assert error(fisher.inverse_diagonal(), inverse.diagonal()) < 1e-12
        for one in (x, x[:, 0]):
            assert error(fisher.product(one), expected @ one) < 1e-13
            assert error(fisher.solve(one), inverse @ one) < 1e-12
            form = (one * (expected @ one)).sum(0)
            assert error(fisher.quadratic_form(one), form) < 1e-13
        assert (fisher.fallbacks, fisher.clamped) == ({}, 0)
    assert torch.equal(x, kept)
    assert all(torch.equal(gradients[name], before[name]) for name in gradients)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("members", [1, 7, 8, 64])
@pytest.mark.parametrize(("block", "size"), [(4, 1), (4, 4), (8, 2), (24, 4)])
def test_inverse_blocks_are_those_of_the_dense_inverse(members: int, block: int, size: int) -> None:
    gradients = draw(members, [(5, 8), (2, 12)])
    inverse = torch.linalg.inv(dense(gradients, DAMPING, block))
    starts = range(0, 64, size)
    expected = torch.stack([inverse[a : a + size, a : a + size] for a in starts])
    found = RankOneFisher(HeldGradients(gradients), DAMPING, block).inverse_blocks(size)
    assert error(found, expected) < 1e-12


@pytest.mark.parametrize(("block", "size"), [(None, 4), (6, 4), (16, 3)])
def test_blocks_of_the_inverse_that_divide_no_block_of_f(block: int | None, size: int) -> None:
    fisher = RankOneFisher(HeldGradients(draw(3, [(4, 8)])), DAMPING, block)
    with pytest.raises(ValueError, match="do not divide"):
        fisher.inverse_blocks(size)


@pytest.mark.parametrize("block", [None, 5, 16, 100])
def test_identities(block: int | None) -> None:
    gradients = draw(12, SHAPES["several"])
    fisher = RankOneFisher(HeldGradients(gradients), DAMPING, block)
    x, eye = vectors(fisher.size), torch.eye(fisher.size, dtype=torch.float64)
    assert error(fisher.product(fisher.solve(x)), x) < 1e-12
    assert error(fisher.solve(fisher.product(x)), x) < 1e-12
    assert error(fisher.product(eye).diagonal(), fisher.diagonal()) < 1e-14
    assert error(fisher.solve(eye).diagonal(), fisher.inverse_diagonal()) < 1e-13
    assert error(fisher.quadratic_form(eye), fisher.diagonal()) < 1e-14
    assert error(fisher.quadratic_form(x), (x * fisher.product(x)).sum(0)) < 1e-14
    names = {name: gradient[0].numel() for name, gradient in gradients.items()}
    assert {name: span.stop - span.start for name, span in fisher.spans.items()} == names


def recursion(rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """diag(F^-1) and F^-1 itself by M-FAC's sums over members (2107.03356, section 3.1).

    F_k^-1 x = x / damping - sum over j <= k of v_j (v_j^T x) / (m + g_j^T v_j), v_j = F_j-1^-1 g_j.
    """
    members, size = rows.shape
    v, scale = torch.zeros_like(rows), rows.new_zeros(members)

    def times(x: Tensor, k: int) -> Tensor:
        return x / damping - (v[:k].T / scale[:k]) @ (v[:k] @ x)

    for k, row in enumerate(rows):
        v[k] = times(row, k)
        scale[k] = members + row @ v[k]
    inverse = times(torch.eye(size, dtype=rows.dtype), members)
    return 1 / damping - (v.square() / scale[:, None]).sum(0), inverse


@pytest.mark.parametrize(("members", "size"), [(1, 1), (1, 9), (5, 40), (40, 40), (64, 33)])
@pytest.mark.parametrize("block", [None, 40])
def test_agrees_with_the_recursion(members: int, size: int, block: int | None) -> None:
    gradients = draw(members, [(size,)])
    diagonal, inverse = recursion(matrix(gradients), DAMPING)
    fisher = RankOneFisher(HeldGradients(gradients), DAMPING, block)
    assert error(fisher.inverse_diagonal(), diagonal) < 1e-12
    x = vectors(size)
    assert error(fisher.solve(x), inverse @ x) < 1e-12


def test_small_damping_and_many_members() -> None:
    """B = 50, m = 1024, damping 1e-8 of the mean: where float32 recursions lose positivity."""
    gradients = draw(1024, [(10, 50)])
    scales = torch.logspace(0, -3, 50)  # some directions are nearly flat
    gradients["w0"] *= scales
    fisher = RankOneFisher(HeldGradients(gradients), 1e-8, 50, relative=True)
    mean = float(matrix(gradients).square().mean())
    assert fisher.damping == pytest.approx(1e-8 * mean, rel=1e-6)
    expected = torch.linalg.inv(dense(gradients, fisher.damping, 50))
    assert error(fisher.inverse_diagonal(), expected.diagonal()) < 1e-9
    relative = fisher.inverse_diagonal() / expected.diagonal() - 1
    assert float(relative.abs().max()) < 1e-9
    assert (fisher.clamped, fisher.fallbacks) == (0, {})
    x = vectors(500)
    assert error(fisher.product(fisher.solve(x)), x) < 1e-9


def test_as_many_members_as_weights_need_no_damping() -> None:
    """On the members' side so little damping would divide rounding."""
    gradients = draw(16, [(4, 16)])
    found = RankOneFisher(HeldGradients(gradients), 1e-14, block=16).inverse_diagonal()
    rows = matrix(gradients).reshape(16, 4, 16).transpose(0, 1)
    wanted = torch.linalg.inv(rows.mT @ rows / 16).diagonal(dim1=1, dim2=2).flatten()
    assert error(found, wanted) < 1e-6


def test_the_recursion_in_float32_fails_there() -> None:
    """Why factors are in float64: a tenth or more of what it finds is not even positive."""
    rows = draw(1024, [(50,)])["w0"]
    damping = 1e-8 * float(rows.square().mean())
    single, _ = recursion(rows, damping)
    assert float((single <= 0).double().mean()) > 0.1
    found = RankOneFisher(HeldGradients({"w": rows}), damping, 50).inverse_diagonal()
    double, _ = recursion(rows.double(), damping)
    truth = torch.linalg.inv(dense({"w": rows}, damping, None)).diagonal()
    assert error(found, truth) < 1e-12 < error(double, truth)


def test_deficient_blocks_with_small_damping() -> None:
    """1024 gradients in 5 of 50 dimensions: most of F^-1 is 1 / damping, nothing falls back."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(1024, 5, generator=generator) @ torch.randn(5, 50, generator=generator)
    damping = 1e-8 * float(low.square().mean())
    fisher = RankOneFisher(HeldGradients({"w": low}), damping, 50)
    truth = torch.linalg.inv(dense({"w": low}, damping, None)).diagonal()
    assert error(fisher.inverse_diagonal(), truth) < 1e-6
    assert (fisher.clamped, fisher.fallbacks) == (0, {})


@pytest.mark.parametrize("block", [None, 64, 3])
@pytest.mark.parametrize("damping", [1e-300, 1e-18, 1e-3, 1e12])
def test_inverse_diagonal_stays_within_its_bounds(damping: float, block: int | None) -> None:
    gradients = draw(8, [(20,)])
    gradients["w0"][4:] = gradients["w0"][:4]  # twice the same examples: G G^T is singular
    fisher = RankOneFisher(HeldGradients(gradients), damping, block)
    found = fisher.inverse_diagonal()
    used = torch.tensor(list(fisher.fallbacks.values()) or [damping], dtype=torch.float64)
    squares = matrix(gradients).square().mean(0)
    assert found.isfinite().all()
    assert bool((found >= (1 - 1e-12) / (used.max() + squares)).all())
    assert bool((found <= (1 + 1e-12) / used.min()).all())


def test_singular_blocks_fall_back_and_are_counted() -> None:
    """Rank one in blocks of four, with a damping below the rounding of the first block alone."""
    gradients = torch.ones(3, 9)
    gradients[:, 4:8] *= 1e-6
    fisher = RankOneFisher(HeldGradients({"w": gradients}), 1e-20, 4)
    found, x = fisher.inverse_diagonal(), vectors(9)
    assert list(fisher.fallbacks) == [0]  # 1e-12 can be told from 1e-20 there; a single weight too
    used = fisher.fallbacks[0]
    assert 1e-20 < used < 1e-14
    exact = (1 / used) * (1 - 1 / (4 + used))  # of used I + ones ones^T
    assert error(found[:4], torch.full((4,), exact, dtype=torch.float64)) < 1e-2
    assert float(found[8]) == pytest.approx(1.0)
    fisher.solve(x)
    assert list(fisher.fallbacks.values()) == [used]


def test_cholesky_retries_only_what_failed() -> None:
    good, bad = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    lower, dampings = cholesky(torch.stack([good, bad]), 1e-30)
    assert float(dampings[0]) == 1e-30 < 1e-17 < float(dampings[1]) < 1e-13
    assert error(lower[0], good) < 1e-15
    assert error(lower[1] @ lower[1].T, bad) < 1e-12


@pytest.mark.parametrize("block", [None, 2, 50])
def test_zero_gradients_leave_the_damping(block: int | None) -> None:
    zeros = {"w": torch.zeros(4, 10)}
    fisher = RankOneFisher(HeldGradients(zeros), 0.5, block)
    x = vectors(10)
    torch.testing.assert_close(fisher.inverse_diagonal(), torch.full((10,), 2.0).double())
    torch.testing.assert_close(fisher.product(x), 0.5 * x)
    torch.testing.assert_close(fisher.solve(x), 2 * x)
    assert (fisher.clamped, fisher.fallbacks) == (0, {})
    with pytest.raises(InputError, match="every gradient is zero"):
        RankOneFisher(HeldGradients(zeros), 0.5, block, relative=True)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_that_are_not_finite_are_refused(value: float, block: int | None) -> None:
    gradients = draw(5, [(3,), (4, 4)])
    gradients["w1"][2, 3, 1] = value
    fisher = RankOneFisher(HeldGradients(gradients), DAMPING, block)
    x = vectors(19)
    calls: list[Callable[[], Tensor]] = [
        fisher.diagonal,
        fisher.inverse_diagonal,
        lambda: fisher.solve(x),
        lambda: fisher.product(x),
    ]
    for call in calls:
        with pytest.raises(InputError, match="w1: member 2 is not finite"):
            call()


def test_squares_that_overflow_are_refused() -> None:
    huge = HeldGradients({"w": torch.full((2, 3), 1e200, dtype=torch.float64)})
    for block in (None, 1):
        with pytest.raises(InputError, match="overflow"):
            RankOneFisher(huge, 1.0, block).inverse_diagonal()


def test_arguments_out_of_range() -> None:
    gradients = HeldGradients(draw(2, [(3,)]))
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be"):
            RankOneFisher(gradients, damping)
    with pytest.raises(ValueError, match="one weight at least"):
        RankOneFisher(gradients, 1.0, 0)
    fisher = RankOneFisher(gradients, 1.0)
    for x in (torch.ones(4), torch.ones(3, 1, 1), torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected floating point, \[3\]"):
            fisher.solve(x)
    for tensors in ({}, {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, {"a": torch.ones(0, 3)}):
        with pytest.raises(ValueError, match="same members"):
            HeldGradients(tensors)


@pytest.mark.parametrize("block", [None, 16])
def test_float32_products(block: int | None) -> None:
    gradients = draw(30, [(40, 16)])
    exact = RankOneFisher(HeldGradients(gradients), DAMPING, block)
    fast = RankOneFisher(HeldGradients(gradients), DAMPING, block, dtype=torch.float32)
    x = vectors(640).float()
    assert fast.solve(x).dtype == torch.float32
    assert error(fast.inverse_diagonal(), exact.inverse_diagonal()) < 1e-5
    assert error(fast.solve(x), exact.solve(x.double())) < 1e-4
    assert error(fast.product(x), exact.product(x.double())) < 1e-6
