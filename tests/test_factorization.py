"""Factorization methods: each against the minimum of its own objective, found by brute force."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fishertool.factorization.asvd import asvd
from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.kronecker import kronecker
from fishertool.factorization.method import Decomposition
from fishertool.factorization.parts.eigen import Leading
from fishertool.factorization.parts.gram import Weighting, decompose
from fishertool.factorization.svd import svd
from fishertool.factorization.tfwsvd import _step, tfwsvd
from fishertool.factorization.whitened import whitened
from fishertool.registry import find_method, method_names

PACKAGE = "fishertool.factorization"
METHODS = method_names(PACKAGE)
SHAPES = [(5, 7), (6, 4)]
SIZES = [(1, 1), (2, 2), (1, 2), (2, 1), (63, 64), (64, 63), (64, 2)]


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def statistics(shape: tuple[int, int], tokens: int = 200) -> dict[str, Tensor]:
    """Those of a layer whose gradients and inputs are correlated and of many sizes."""
    out, width = shape
    x = random(tokens, width, seed=1) @ random(width, width, seed=2) * random(width, seed=3).exp()
    d = random(tokens, out, seed=4) @ random(out, out, seed=5) * random(out, seed=6).exp()
    fisher = (d.square().T @ x.square()) / tokens
    return {
        "fisher": fisher,
        "rows": fisher.sum(1),
        "columns": fisher.sum(0),
        "inputs": x.T @ x / tokens,
        "gradients": d.T @ d / tokens,
    }


def run(name: str, weight: Tensor, given: dict[str, Tensor], **settings: Any) -> Decomposition:
    method = find_method(PACKAGE, name)
    wanted = {key: given[key] for key in method.inputs if key in given}
    found: Decomposition = method.function(weight, **wanted, **settings)
    return found


def objective_of(
    name: str, given: dict[str, Tensor], **settings: Any
) -> Callable[[Tensor], Tensor]:
    """From the definitions, of an error [out, in]."""
    rows, columns = given["rows"][:, None], given["columns"]
    if name == "fwsvd" and settings.get("sides") == "both":
        return lambda error: (rows * columns / rows.sum() * error.square()).sum()
    if name == "kronecker":
        damping = settings.get("damping", 1e-3)
        a, b = (
            matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix))
            for matrix in (given["inputs"], given["gradients"])
        )
        return lambda error: torch.trace(b @ error @ a @ error.T)
    return {
        "svd": lambda error: error.square().sum(),
        "fwsvd": lambda error: (columns / len(rows) * error.square()).sum(),
        "asvd": lambda error: (given["inputs"].diagonal().sqrt() * error.square()).sum(),
        "whitened": lambda error: torch.trace(error @ given["inputs"] @ error.T),
        "tfwsvd": lambda error: (given["fisher"] * error.square()).sum(),
    }[name]  # fmt: skip


def brute_force(weight: Tensor, rank: int, objective: Callable[[Tensor], Tensor]) -> float:
    """The least value that LBFGS finds from several starts."""
    best = math.inf
    for seed in range(3):
        left = random(weight.shape[0], rank, seed=100 + seed).requires_grad_()
        right = random(rank, weight.shape[1], seed=200 + seed).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [left, right], max_iter=300, max_eval=1000, tolerance_grad=1e-12,
            tolerance_change=1e-15, history_size=30, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(left: Tensor = left, right: Tensor = right) -> Tensor:
            left.grad = right.grad = None
            loss = objective(weight - left @ right)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        best = min(best, float(objective(weight - left @ right).detach()))
    return best


CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in METHODS if name != "tfwsvd"],
    ("fwsvd", {"sides": "both"}),
    ("kronecker", {"damping": 0.1}),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_closed_forms_reach_the_minimum_of_their_objective(
    name: str, settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    weight, given = random(*shape, seed=0), statistics(shape)
    found = run(name, weight, given, **settings)
    objective = objective_of(name, given, **settings)
    whole = float(objective(weight))
    for rank in (1, 3):
        left, right = found.truncate(rank)
        reached = float(objective(weight - left @ right))
        assert reached <= brute_force(weight, rank, objective) + 1e-9 * whole
        # The singular values tell that error without forming it, and so does the method's norm.
        tail = float(found.singular_values(min(shape))[rank:].square().sum())
        assert tail == pytest.approx(reached, rel=1e-6, abs=1e-9 * whole)
        assert float(found.square_norm(weight - left @ right)) == pytest.approx(reached, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise_weights_reach_the_minimum_and_never_lose_to_their_start(
    shape: tuple[int, int],
) -> None:
    weight, given = random(*shape, seed=0), statistics(shape)
    objective = objective_of("tfwsvd", given)
    for rank in (1, 2):
        start = run("fwsvd", weight, given, sides="both").truncate(rank)
        found = run("tfwsvd", weight, given, iterations=300, tolerance=1e-12).truncate(rank)
        reached = float(objective(weight - found.left @ found.right))
        assert reached <= float(objective(weight - start.left @ start.right))
        # The objective has local minima; from this start the best known one is reached nearly.
        assert reached <= 1.02 * brute_force(weight, rank, objective)


def test_refinement_starts_where_it_is_told_and_each_iteration_helps() -> None:
    weight, given = random(8, 9, seed=0), statistics((8, 9))
    objective = objective_of("tfwsvd", given)
    start = svd(weight)
    errors = [float(objective(weight - torch.matmul(*start.truncate(2))))]
    for iterations in (1, 2, 4, 8):
        refined = tfwsvd(weight, given["fisher"], start, iterations=iterations, tolerance=0.0)
        errors.append(float(refined.square_norm(weight - torch.matmul(*refined.truncate(2)))))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]
    none = tfwsvd(weight, given["fisher"], start, iterations=0)
    assert torch.equal(none.truncate(2).left, start.truncate(2).left)


def test_elementwise_steps_end_in_every_rows_least_squares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (5, 7), (3, 7))
    residual, fisher, basis = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    fisher = fisher**4
    fisher[1], fisher[:, 2] = 0, 0
    monkeypatch.setattr("fishertool.factorization.tfwsvd.INNER", 40)
    steps = _step(residual, fisher, basis)
    for row in (0, 2, 3, 4):
        root = fisher[row].sqrt()
        exact = torch.linalg.lstsq((basis * root).T, residual[row] * root).solution
        torch.testing.assert_close(steps[row], exact, rtol=1e-8, atol=1e-10)
    assert not steps[1].any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    "sparse", ["a row of one", "many rows of one", "columns of one", "nearly all", "tiny rest"]
)
def test_elementwise_steps_on_sparse_fishers_never_rise_nor_blow_up(
    sparse: str, scale: float
) -> None:
    """A row of fewer weights that count than the rank has many solutions, and no step past one."""
    generator = torch.Generator().manual_seed(0)
    weight, fisher = (torch.rand(60, 80, generator=generator, dtype=torch.float64) for _ in "wf")
    rows = {"a row of one": 1, "many rows of one": 30, "tiny rest": 5}.get(sparse, 0)
    fisher[:rows, 1:] = 1e-30 if sparse == "tiny rest" else 0
    if sparse == "columns of one":
        fisher[1:, :5] = 0
    if sparse == "nearly all":
        fisher[torch.rand(60, 80, generator=generator) < 0.99] = 0
    fisher *= scale
    errors = []
    for iterations in range(6):
        found = tfwsvd(weight, fisher, iterations=iterations, tolerance=0.0).truncate(20)
        errors.append(float((fisher * (weight - found.left @ found.right).square()).sum()))
        assert float(found.left.abs().max()) < 1e4
        assert float(found.right.abs().max()) < 1e4
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_elementwise_weights_of_rank_one_are_the_two_sided_case() -> None:
    weight, given = random(6, 7, seed=0), statistics((6, 7))
    given["fisher"] = given["rows"].outer(given["columns"]) / given["rows"].sum()
    refined = run("tfwsvd", weight, given, iterations=20).truncate(2)
    closed = run("fwsvd", weight, given, sides="both").truncate(2)
    torch.testing.assert_close(
        refined.left @ refined.right, closed.left @ closed.right, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SIZES)
def test_full_rank_gives_the_matrix_back_and_arguments_stay(
    name: str, shape: tuple[int, int]
) -> None:
    weight, given = random(*shape, seed=0).float(), statistics(shape)
    before = {"weight": weight.clone(), **{key: value.clone() for key, value in given.items()}}
    left, right = run(name, weight, given).truncate(min(shape))
    assert (left.shape, right.shape) == ((shape[0], min(shape)), (min(shape), shape[1]))
    assert left.dtype == right.dtype == torch.float64
    torch.testing.assert_close(left @ right, weight.double(), rtol=1e-6, atol=1e-6)
    for key, value in {"weight": weight, **given}.items():
        assert torch.equal(value, before[key])
    # Terms are shared out evenly, so that a narrow dtype holds both factors.
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_weighting_is_never_worse_than_svd_on_its_objective(
    shape: tuple[int, int],
) -> None:
    for seed in range(5):
        weight, given = random(*shape, seed=seed), statistics(shape)
        plain = svd(weight)
        for sides in ("in", "both"):
            found = run("fwsvd", weight, given, sides=sides)
            objective = objective_of("fwsvd", given, sides=sides)
            for rank in range(1, min(shape)):
                ours = float(objective(weight - torch.matmul(*found.truncate(rank))))
                theirs = float(objective(weight - torch.matmul(*plain.truncate(rank))))
                assert ours <= theirs * (1 + 1e-9)


def test_the_weights_are_the_inputs_and_the_other_side_is_worse() -> None:
    # One input matters, and its column is small; so is one row, of an output that does not.
    weight = torch.tensor([[3.0, 0.1, 0.1], [0.1, 3.0, 0.1], [0.1, 0.1, 0.2]]).double()
    fisher = torch.tensor([[1.0, 1.0, 900.0]]).expand(3, 3).double()
    found = fwsvd(weight, fisher.sum(1), fisher.sum(0)).truncate(1)
    wrong = fwsvd(weight.T, fisher.sum(0), fisher.sum(1)).truncate(1)
    objective = objective_of("tfwsvd", {"fisher": fisher, "rows": fisher, "columns": fisher})
    right_side = float(objective(weight - found.left @ found.right))
    wrong_side = float(objective(weight - (wrong.left @ wrong.right).T))
    assert right_side < 0.7 * wrong_side
    error = (weight - found.left @ found.right)[:, 2].abs().max()
    assert error < 0.05  # the column that matters is kept


def test_singular_statistics_are_no_obstacle() -> None:
    for shape in ((6, 9), (9, 6)):
        weight, given = random(*shape, seed=0), statistics(shape, tokens=3)
        given["fisher"][:, 2] = given["columns"][2] = 0  # inputs that are never active
        given["fisher"][1] = given["rows"][1] = 0
        given["inputs"][2] = given["inputs"][:, 2] = 0
        assert torch.linalg.matrix_rank(given["inputs"]) <= 3
        for name, settings in [*CASES, ("kronecker", {"damping": 0.0}), ("tfwsvd", {})]:
            found = run(name, weight, given, **settings)
            error = weight - torch.matmul(*found.truncate(4))
            plain = weight - torch.matmul(*svd(weight).truncate(4))
            assert float(error.norm()) < 100 * float(weight.norm()), name
            assert found.square_norm(error) <= found.square_norm(plain) * (1 + 1e-9), name
        for name, settings in (("fwsvd", {}), ("fwsvd", {"sides": "both"}), ("asvd", {})):
            found = run(name, weight, given, floor=0.0, **settings)
            assert all(one.isfinite().all() for one in found.truncate(4)), name
    # Inputs of rank 3 leave nothing to lose at rank 3.
    found = whitened(weight, given["inputs"])
    error = weight - torch.matmul(*found.truncate(3))
    assert float(found.square_norm(error)) < 1e-8 * float(found.square_norm(weight))


@pytest.mark.parametrize("kind", ["random", "of low rank", "the identity", "zeros", "graded"])
@pytest.mark.parametrize("side", [1, 2, 63, 64])
def test_leading_eigenvectors_are_those_of_the_whole_decomposition(
    side: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch.linalg.eigh")  # that of last resort
    rank = {"of low rank": max(1, side // 8), "zeros": 0}.get(kind, side)
    factor = torch.eye(side).double() if kind == "the identity" else random(side, rank, seed=0)
    if kind == "graded":
        factor *= torch.logspace(0, -12, side).double()[:, None]
    matrix = factor @ factor.T
    values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)
    scale = float(values[0]) or 1.0
    for count in sorted({max(1, side // 8), max(1, side // 4), side // 4 + 1, side}):
        found = Leading(matrix + torch.full_like(matrix, math.nan).tril(-1))
        vectors = found.vectors(count)
        assert vectors.shape == (side, count)
        assert float((found.values(count) - values[:count]).abs().max()) < 1e-13 * scale
        assert float((vectors.T @ vectors - torch.eye(count)).abs().max()) < 1e-12
        residual = matrix @ vectors - vectors * found.values(count)
        assert float(residual.abs().max()) < 1e-13 * scale
        assert torch.equal(found.vectors(1), vectors[:, :1])  # of those that are kept


def test_eigenvalues_that_do_not_converge_are_an_error() -> None:
    for count in (1, 8):
        with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            Leading(torch.full((8, 8), math.nan, dtype=torch.float64)).values(count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("whole", [False, True])
def test_without_a_floor_dead_dimensions_are_left_out(shape: tuple[int, int], whole: bool) -> None:
    weight, squares = random(*shape, seed=0), []
    for side in shape:
        alive = random(side, seed=side).exp()
        alive[1] = 0
        turn = torch.linalg.qr(random(side, side, seed=1))[0]
        squares.append(turn @ alive.diag() @ turn.T if whole else alive.diag())
    given = squares if whole else [square.diagonal() for square in squares]
    found = decompose(weight, *(Weighting(square, floor=0.0) for square in given))
    roots = [u @ s.clamp(min=0).sqrt().diag() @ u.T for s, u in map(torch.linalg.eigh, squares)]
    u, s, v = torch.linalg.svd(roots[0] @ weight @ roots[1], full_matrices=False)
    best = u[:, :2] @ s[:2].diag() @ v[:2]
    left, right = found.truncate(2)
    torch.testing.assert_close(roots[0] @ left @ right @ roots[1], best, rtol=1e-6, atol=1e-6)
    # Nothing is made up of what the smaller side, whose root is inverted, does not weigh.
    side = 0 if shape[0] <= shape[1] else 1
    dead = torch.eye(shape[side]).double() - squares[side] @ torch.linalg.pinv(squares[side])
    lost = dead @ left if side == 0 else right @ dead
    assert float(lost.norm()) < 1e-6


@pytest.mark.parametrize("name", [name for name in METHODS if name != "svd"])
def test_a_statistic_of_nothing_is_refused(name: str) -> None:
    weight = random(4, 5, seed=0)
    for value in (0.0, math.nan, -1.0):
        given = {key: torch.full_like(one, value) for key, one in statistics((4, 5)).items()}
        with pytest.raises(ValueError, match="statistic is"):
            run(name, weight, given)


def test_scaling_the_statistic_changes_nothing() -> None:
    weight, given = random(5, 7, seed=0), statistics((5, 7))
    small = {key: value * 1e-12 for key, value in given.items()}
    for name in METHODS:
        first, second = (
            torch.matmul(*run(name, weight, one).truncate(2)) for one in (given, small)
        )
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


def test_the_two_sided_spectrum_is_in_units_of_the_fisher() -> None:
    # So that terms of different matrices compare: sum F_ij W_ij^2 of a Fisher of rank one.
    weight, given = random(5, 7, seed=0), statistics((5, 7))
    fisher = given["rows"].outer(given["columns"]) / given["rows"].sum()
    both = fwsvd(weight, given["rows"], given["columns"], sides="both").singular_values(5)
    assert float(both.square().sum()) == pytest.approx(float((fisher * weight.square()).sum()))
    even = given["columns"].expand(5, 7) / 5
    one = fwsvd(weight, given["rows"], given["columns"]).singular_values(5)
    assert float(one.square().sum()) == pytest.approx(float((even * weight.square()).sum()))


def test_equal_inputs_and_outputs_make_every_method_svd() -> None:
    weight, ones = random(6, 8, seed=0), torch.ones(6, 8).double()
    plain = torch.matmul(*svd(weight).truncate(2))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(plain, u[:, :2] @ torch.diag(s[:2]) @ v[:2], rtol=1e-7, atol=1e-8)
    a, b = torch.eye(8).double(), torch.eye(6).double()
    for other in (
        fwsvd(weight, ones.sum(1), ones.sum(0)), asvd(weight, a), whitened(weight, a),
        kronecker(weight, a, b), tfwsvd(weight, ones),
    ):  # fmt: skip
        torch.testing.assert_close(torch.matmul(*other.truncate(2)), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_the_terms_do_not_reach_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of 3 terms"):
        svd(random(3, 5, seed=0)).truncate(rank)


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    left, right = svd(torch.zeros(3, 4)).truncate(2)
    assert left.isfinite().all()
    assert not (left @ right).any()
