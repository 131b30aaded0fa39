"""A model's stack of layers: what is before and after it, and whether layers make a stack together."""

from collections.abc import Mapping, Sequence
from typing import Any

from fishertool.checkpoint.source import TensorSource
from fishertool.errors import InputError, some
from fishertool.models.names import empty_model, names_on_disk, origins_by_disk_name
from fishertool.models.use_order import order_of_use


def check_layers(
    source: TensorSource,
    changes: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    trust_remote_code: bool,
) -> None:
    """Refuse layers put together in an order that the config cannot describe.

    source   whose config.json has these `changes` then
    shapes   names on disk -> shapes, of all tensors

    Raises InputError with the parameters that the model would have and these tensors do not give.
    """
    model = empty_model(source, trust_remote_code, changes)
    if model is None:
        return
    parameters = dict(model.named_parameters())
    origins = origins_by_disk_name(model, parameters, source.folder)
    served = {one.name for one in origins.values() if one is not None}
    given = set()
    for name, one in origins.items():
        if one is None or name not in shapes:
            continue
        given.add(one.name)
        if tuple(shapes[name]) != one.shape:
            raise InputError(
                f"{source.folder}: its config.json makes {name} {list(one.shape)}, but it would be "
                f"{list(shapes[name])}; put together layers of models of one size"
            )
    if lacking := [name for name in parameters if name in served - given]:
        raise InputError(
            f"{source.folder}: config.json cannot describe layers in this order: they lack "
            f"{some(lacking)}; put together layers of one kind, or in the order they had"
        )


def names_after_layers(source: TensorSource, stack: str, outside: Sequence[str]) -> list[str]:
    """Of the tensors outside a stack of layers (`model.layers.`), those that the model first uses
    after it has used all layers; where a forward pass does not tell, that it registers after them.

    Raises InputError for an architecture transformers does not have.
    """
    model = empty_model(source)
    if model is None:
        raise InputError(
            f"{source.folder}: what comes before and after its layers cannot be told: its "
            "architecture is not in transformers"
        )
    on_disk = names_on_disk(model, source)
    after: dict[str, bool] = {}
    for order in (
        [name for name, _ in model.named_parameters(remove_duplicate=False)],
        order_of_use(model),
    ):
        disk = dict.fromkeys(on_disk[name] for name in order if name in on_disk)
        after |= _after(stack, list(disk))
    return [name for name in outside if after.get(name)]


def _after(stack: str, order: Sequence[str]) -> dict[str, bool]:
    """Whether each name comes after all of the stack's; nothing if there are none of it."""
    layers = [place for place, name in enumerate(order) if name.startswith(stack)]
    return {name: place > max(layers) for place, name in enumerate(order)} if layers else {}
