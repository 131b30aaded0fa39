"""Whose row a token has in the models that lack it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fishertool.errors import UsageError
from fishertool.registry import suggest


@dataclass(frozen=True)
class Donor:
    """Whose row a token has in models that lack it, or with `force` in all."""

    model: str | None
    """None gives zero."""
    token: str | int | None = None
    """That model's token, or its id; None is the same token."""
    force: bool = False


def known(name: str, models: Collection[str], where: str) -> str:
    if name not in models:
        raise UsageError(f"{where}: {suggest(name, models)}")
    return name


def donated_rows(
    own: Mapping[str, Tensor],
    base: str | None,
    donors: Mapping[str, Donor],
    output: Mapping[str, int],
    vocabularies: Mapping[str, Mapping[str, int]],
    sizes: Mapping[str, int],
) -> tuple[dict[str, Tensor], Tensor]:
    """Each model's rows for those that lack a token, and which tokens are forced; [output row].

    `own` are each model's own rows, -1 where it lacks the token. The base gives where it has the
    token; else all that have it do, to be averaged; `donors` decide otherwise. Raises UsageError
    for a donor's token that its model has not.
    """
    given = {name: rows.clone() for name, rows in own.items()}
    forced = torch.zeros(len(next(iter(own.values()))), dtype=torch.bool)
    if base is not None:
        for name in own:
            if name != base:
                given[name][own[base] >= 0] = -1
    for token, donor in donors.items():
        place = output[token]
        forced[place] = donor.force
        for rows in given.values():
            rows[place] = -1
        if donor.model is None:
            continue
        wanted = token if donor.token is None else donor.token
        model = known(donor.model, vocabularies, f"tokenizer: tokens: {token!r}")
        row = vocabularies[model].get(wanted, -1) if isinstance(wanted, str) else wanted
        if not 0 <= row < sizes[donor.model]:
            raise UsageError(f"tokenizer: tokens: {token!r}: {donor.model} has no token {wanted!r}")
        given[donor.model][place] = row
    return given, forced
