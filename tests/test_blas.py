"""Symmetric and triangular products, by BLAS and by torch, against products of whole matrices."""

from collections.abc import Callable, Iterator

import pytest
import torch
from test_fisher_diagonal import relative_error
from torch import Tensor

from fishertool import blas

BOUND = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda rows: rows,
    "columns": lambda rows: rows.T.contiguous().T,
    "part": lambda rows: torch.cat([rows, rows], 1)[:, : rows.shape[1]],
    "every-second": lambda rows: rows.repeat_interleave(2, 1)[:, ::2],
    "one-for-all": lambda rows: rows[:1].expand_as(rows),
}


@pytest.fixture(params=[1, 2], ids=["blas", "torch"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("count", "side"), [(1, 1), (10, 1), (1, 5), (10, 2), (10, 64), (3, 300)])
def test_a_symmetric_product_is_summed_by_its_upper_half(
    monkeypatch: pytest.MonkeyPatch, count: int, side: int, layout: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(blas, "STRIP", 200)
    rows = LAYOUTS[layout](random(count, side).to(dtype))
    total = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(2):
        blas.add_gram(total, rows)
    expected = 2 * rows.double().T @ rows.double()
    assert relative_error(total.triu(), expected.triu()) < BOUND[dtype]


def test_no_rows_add_nothing() -> None:
    total = torch.eye(3, dtype=torch.float64)
    blas.add_gram(total, random(0, 3))
    assert total.equal(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "every-second"])
@pytest.mark.parametrize(("side", "columns"), [(1, 1), (2, 5), (5, 2), (64, 33)])
def test_a_triangular_product(side: int, columns: int, layout: str, dtype: torch.dtype) -> None:
    lower, matrix = random(side, side, dtype=dtype).tril(), random(side, columns, dtype=dtype)
    found = blas.triangular_product(LAYOUTS[layout](lower), LAYOUTS[layout](matrix))
    assert found.dtype == dtype
    assert relative_error(found, lower.double().T @ matrix.double()) < BOUND[dtype]
