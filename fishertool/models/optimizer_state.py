"""Adam's second moments, by the names of the model's tensors on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError, some
from fishertool.fisher.views import views_by_parameter

MOMENT = "exp_avg_sq"


def second_moments(path: Path, module: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read an optimizer's state; for each tensor of `named` its second moment, float32.

    path    a `torch.save`d state dict of Adam or AdamW, such as a Trainer's optimizer.pt (read
            without running code), or a safetensors file with a moment under each tensor's name,
            with or without `exp_avg_sq` around it
    module  whose `named_parameters` the optimizer was given: where the state has only numbers,
            they are those of all parameters in order, or of all matrices and then the rest, as
            decayed and not decayed ones are grouped; whichever fits by number and shapes
    named   name on disk -> parameter, or the view of one that is on disk under that name

    Moments are divided by 1 - beta2 ^ step where both are known. Raises InputError for a file
    that holds no such state, and for moments that fit the model in number, name or shape neither way.
    """
    check_is_there(path)
    moments = (
        _from_safetensors(path) if path.suffix == ".safetensors" else _from_pickle(path, module)
    )
    moments |= _by_disk_name(path, moments, module, named)
    if lost := [name for name in named if name not in moments]:
        raise InputError(
            f"{path}: has no second moment of {some(lost)}; "
            "--exclude what was not trained, or give the optimizer of this model"
        )
    found = {}
    for name, parameter in named.items():
        value = moments[name]
        _check_shape(path, name, value, parameter)
        if not bool((value >= 0).all()) or not bool(value.isfinite().all()):
            raise InputError(f"{path}: the second moment of {name} is negative or not finite")
        found[name] = value.float()
    return found


def _by_disk_name(
    path: Path, moments: Mapping[str, Tensor], module: nn.Module, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of the model's parameters that have a moment, the parts of it by their names on disk."""
    views = views_by_parameter(named)
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        for view in views.get(id(parameter), ()) if name in moments else ():
            _check_shape(path, name, moments[name], parameter)
            found[view.name] = view.of(moments[name])
    return found


def _check_shape(path: Path, name: str, moment: Tensor, weight: Tensor) -> None:
    if moment.shape != weight.shape:
        raise InputError(
            f"{path}: the second moment of {name} is {list(moment.shape)}, "
            f"the weight {list(weight.shape)}; give the optimizer of this model"
        )


def check_is_there(path: Path) -> None:
    """Raises InputError unless there is such a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    with open_checkpoint(path.parent, stem=path.stem) as tensors:
        return {
            name.removeprefix(f"{MOMENT}.").removesuffix(f".{MOMENT}"): tensors[name]
            for name in tensors
            if not name.endswith((".exp_avg", ".step"))
            and not name.startswith(("exp_avg.", "step."))
        }


def _from_pickle(path: Path, module: nn.Module) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, groups = content["state"], content["param_groups"]
        order = [key for group in groups for key in group["params"]]
        betas = {key: group.get("betas") for group in groups for key in group["params"]}
        moments = {key: _corrected(state[key], betas[key]) for key in order if key in state}
    except Exception as error:  # unpickling raises anything; weights_only runs nothing
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise InputError(
            f"{path}: not the saved state of an Adam optimizer ({type(error).__name__}: {reason})"
        ) from error
    names = [name for group in groups for name in group.get("param_names", ())]
    if all(isinstance(key, str) for key in order):
        return moments
    if len(names) == len(order):
        return {
            name: moments[key] for name, key in zip(names, order, strict=True) if key in moments
        }
    return {
        name: moments[key]
        for name, key in zip(_order(path, module, order, moments), order, strict=True)
        if key in moments
    }


def _corrected(state: Mapping[str, Any], betas: Sequence[float] | None) -> Tensor:
    moment: Tensor = state[MOMENT]
    step = float(state.get("step", 0))
    return moment if betas is None or step <= 0 else moment.float() / (1 - betas[1] ** step)


def _order(
    path: Path, module: nn.Module, keys: Sequence[Any], moments: Mapping[Any, Tensor]
) -> list[str]:
    """The names of parameters in the optimizer's order."""
    parameters = dict(module.named_parameters())
    matrices = [name for name, value in parameters.items() if value.dim() > 1]
    rest = [name for name, value in parameters.items() if value.dim() < 2]
    for names in (list(parameters), matrices + rest):
        if len(names) == len(keys) and all(
            key not in moments or moments[key].shape == parameters[name].shape
            for name, key in zip(names, keys, strict=True)
        ):
            return names
    raise InputError(
        f"{path}: its {len(keys)} parameters are not the model's {len(parameters)} in an order "
        "that is known; save the optimizer with named parameters (torch.optim takes "
        "model.named_parameters())"
    )
