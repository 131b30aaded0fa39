"""Triangular products, by BLAS and by torch, against those of whole matrices."""

from collections.abc import Callable, Iterator

import pytest
import torch
from test_fisher_diagonal import relative_error
from torch import Tensor

from fishertool.factorization.parts import blas

BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda rows: rows,
    "columns": lambda rows: rows.T.contiguous().T,
    "every-second": lambda rows: rows.repeat_interleave(2, 1)[:, ::2],
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
@pytest.mark.parametrize(("side", "columns"), [(1, 1), (2, 5), (5, 2), (64, 33)])
def test_a_triangular_product(side: int, columns: int, layout: str, dtype: torch.dtype) -> None:
    lower, matrix = random(side, side, dtype=dtype).tril(), random(side, columns, dtype=dtype)
    found = blas.triangular_product(LAYOUTS[layout](lower), LAYOUTS[layout](matrix))
    assert found.dtype == dtype
    assert relative_error(found, lower.double().T @ matrix.double()) < BOUND[dtype]
