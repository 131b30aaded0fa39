"""Points made of strong configurations: offspring of candidates with them, and neighbours."""

import torch
from torch import Tensor

F = 0.5
CR = 0.5


def recombine(candidates: Tensor, strong: Tensor, generator: torch.Generator) -> Tensor:
    """One offspring a candidate: v = a + F (b - c), crossed with the candidate, in the cube.

    a, b and c are drawn without replacement from the strong configurations (with it where there
    are fewer than three). Each coordinate is v's with probability CR and the candidate's
    otherwise, one of them v's for certain: differential evolution rand/1/bin (Storn and Price
    1997) with F = CR = 0.5, as in MM-MO (Li et al. 2024, arXiv 2407.00487).

    candidates [candidate, dimension], strong [configuration, dimension] -> as candidates.
    """
    count, dimensions = candidates.shape
    odds = torch.ones(count, len(strong), dtype=torch.float64)
    triples = torch.multinomial(odds, 3, replacement=len(strong) < 3, generator=generator)
    a, b, c = strong[triples].unbind(1)
    mutant = (a + F * (b - c)).clamp(0, 1)
    crossed = torch.rand(count, dimensions, dtype=torch.float64, generator=generator) < CR
    certain = torch.randint(dimensions, (count, 1), generator=generator)
    return torch.where(crossed.scatter(1, certain, True), mutant, candidates)


def neighbours(strong: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """`each` points beside every strong one, of which one coordinate is drawn anew, uniformly.

    strong [configuration, dimension] -> [configuration x each, dimension]
    """
    near = strong.repeat_interleave(each, 0)
    which = torch.randint(near.shape[1], (len(near), 1), generator=generator)
    drawn = torch.rand(len(near), 1, dtype=near.dtype, generator=generator)
    return near.scatter(1, which, drawn)
