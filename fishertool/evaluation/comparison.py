"""Two models on the same data: which class of one is which of the other, and what both can read."""

from collections.abc import Mapping
from dataclasses import replace

from fishertool.calibration import CalibrationData
from fishertool.calibration.classes import have_names, ids_by_name
from fishertool.errors import InputError, some
from fishertool.models.loading import LoadedModel
from fishertool.models.low_rank_layers import table_length

Labels = Mapping[str, int] | None
"""Class names -> ids of a model's head; None if it has none."""


def class_order(labels: Labels, others: Labels, names: str = "the models") -> list[int] | None:
    """For each class of `labels`, in order of ids, the id that `others` has for it.

    None where they are in the same places: without names there is nothing else to go by. Raises
    InputError, naming the models, where the classes are not the same.
    """
    if labels is None or others is None or labels == others:
        return None
    order = ids_by_name(sorted(labels, key=labels.__getitem__), others)
    if order is not None and sorted(labels.values()) == list(range(len(others))):
        return order
    if have_names(labels) and have_names(others):
        alone = sorted(labels.keys() ^ others.keys())
        raise InputError(
            f"{names} have other classes, only one of them {some(alone)}; where they mean the same, "
            "give them the same names in id2label of config.json"
        )
    return None


def reader_for_both(model: LoadedModel, other: LoadedModel, names: str) -> LoadedModel:
    """The model with no more positions than both have, to read data that both are measured on.

    Raises InputError, naming the models, where their classes are not the same.
    """
    class_order(model.labels, other.labels, names)
    limits = [model.max_length, other.max_length, other.tokenizer.model_max_length]
    return replace(model, max_length=min((limit for limit in limits if limit), default=None))


def check_same_tokens(
    data: CalibrationData, model: LoadedModel, other: LoadedModel, names: str
) -> None:
    """Raises InputError, naming the models, where a token of the data is none to the other model,
    or any token another."""
    used = {token for one in data.examples for text in one.texts for token in text["input_ids"]}
    known = table_length(other.pretrained.get_input_embeddings())  # type: ignore[operator]
    mine, theirs = (
        {token: name for name, token in one.tokenizer.get_vocab().items()} for one in (model, other)
    )
    for token in sorted(used | (mine.keys() & theirs.keys())):
        second = theirs.get(token) if token < known else None
        if mine.get(token) != second and (token in used or token < known):
            raise InputError(
                f"{names}: token {token} is {mine.get(token)!r} to the first and {second!r} to the "
                "second; measure models of other tokenizers one by one"
            )
