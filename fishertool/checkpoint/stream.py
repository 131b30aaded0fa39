"""Run a function over the row pieces of many tensors from a few threads, with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from fishertool.checkpoint.header import TensorInfo

PIECE_ELEMENTS = 1 << 20
SMALL = 1 << 15
"""Of a piece with fewer elements nearly all is the interpreter's work, for which threads wait."""

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Rows `[start, stop)` of a tensor."""

    name: str
    start: int
    stop: int
    elements: int


def pieces(tensors: Iterable[TensorInfo], piece_elements: int = PIECE_ELEMENTS) -> Iterator[Piece]:
    """Cut tensors into runs of rows of about `piece_elements`, in the order given.

    A tensor of no elements has no pieces.
    """
    for tensor in tensors:
        if not tensor.elements:
            continue
        step = max(1, piece_elements // tensor.width)
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            yield Piece(tensor.name, start, stop, (stop - start) * tensor.width)


def stream(
    work: Iterable[Piece],
    function: Callable[[Piece], None],
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Call `function` for every piece and `advance` with its elements, as `collect` does."""
    collect(work, function, threads, lambda piece, _: advance(piece.elements))


def collect(
    work: Iterable[Piece],
    function: Callable[[Piece], T],
    threads: int,
    take: Callable[[Piece, T], None],
) -> None:
    """Call `function` for every piece, and `take` with what it returned, in the order of work.

    At most `2 * threads` pieces are under way, small ones in this thread. The function must touch
    nothing but its own piece: then results do not depend on `threads`. The first error stops the
    work and is raised.
    """
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # one piece per thread is the parallelism, of LAPACK's too
    try:
        with threadpool_limits(1, "blas"):
            _collect(work, function, threads, take)
    finally:
        torch.set_num_threads(intra_op)


def _collect(
    work: Iterable[Piece],
    function: Callable[[Piece], T],
    threads: int,
    take: Callable[[Piece, T], None],
) -> None:
    if threads == 1:
        for piece in work:
            take(piece, function(piece))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="piece") as pool:
        waiting: deque[tuple[Piece, Future[T]]] = deque()
        try:
            for piece in work:
                if len(waiting) == 2 * threads:
                    _finish(waiting, take)
                run = _now if piece.elements < SMALL else pool.submit
                waiting.append((piece, run(function, piece)))
            while waiting:
                _finish(waiting, take)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _finish(waiting: deque[tuple[Piece, Future[T]]], take: Callable[[Piece, T], None]) -> None:
    piece, future = waiting.popleft()
    take(piece, future.result())


def _now(function: Callable[[Piece], T], piece: Piece) -> Future[T]:
    done: Future[T] = Future()
    done.set_result(function(piece))
    return done
