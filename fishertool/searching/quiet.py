"""BoTorch without its warnings: what they say, a user of a search can do nothing about."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    # Recorded, for BoTorch turns some of its warnings on again where it gives them.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield
