"""What adapter_config.json says of a LoRA adapter, as peft means it."""

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fishertool.checkpoint.json_files import load_json
from fishertool.errors import InputError, some

CONFIG = "adapter_config.json"
STEM = "adapter_model"
"""Of the file beside it."""
UNIT = re.compile(r"(\\[dw.-]|\[[\w.-]+\]|[\w.-])([+*]?)")
"""Of peft's regular expressions for the ends of names: a letter, and whether it is repeated."""
LARGEST = 2**31 - 1
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
"""Options that are honoured, or whose effect is all in the file's tensors; others must be off."""
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", None)
"""Ways to initialise that leave the base's weights as they are."""


def read_options(path: Path) -> dict[str, Any]:
    """The file's content. Raises InputError, by name, for an option that is not understood."""
    config = load_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')}; LORA is served")
    foreign = {name for name, value in config.items() if name not in UNDERSTOOD and value}
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise InputError(
            f"{path}: init_lora_weights {start!r}: it was trained on a base that this "
            "initialisation had changed; convert it as peft's save_pretrained does with "
            "path_initial_model_for_weight_conversion, or merge it with peft"
        )
    if foreign:
        options = some(sorted(f"{name} {config[name]!r}" for name in foreign))
        raise InputError(f"{path}: {options}: not served; merge the adapter with peft")
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Ranks are whole numbers, alphas finite ones, and patterns are of names."""
    for own, by_name, kinds, least, wanted in (
        ("r", "rank_pattern", int, 1, "a whole number of at least 1"),
        ("lora_alpha", "alpha_pattern", int | float, -LARGEST, "a finite number"),
    ):
        pattern = config.get(by_name) or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{path}: {by_name} maps no names to numbers")
        numbers: dict[str, Any] = {f"{by_name} {key!r}": pattern[key] for key in pattern}
        numbers[own] = config.get(own)
        for name, number in numbers.items():
            known = isinstance(number, kinds) and not isinstance(number, bool)
            if not known or not least <= number <= LARGEST:
                raise InputError(f"{path}: {name} is {reprlib.repr(number)}, not {wanted}")
        for key in pattern:
            if not all(map(_is_served, key.split("|"))):
                raise InputError(
                    f"{path}: {by_name} {key!r}: a regular expression that is more than letters, "
                    "repeats (+ and *) and | is not served; merge the adapter with peft"
                )


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Of a module's pair A and B."""
    rank = _of(config.get("rank_pattern"), module, config["r"])
    alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
    return int(rank), alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _of(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """A pattern's value for a module: the first key that ends its name, as peft reads them."""
    for key, value in (pattern or {}).items():
        if any(_ends(module, part) for part in key.split("|")):
            return value
    return default


def _ends(module: str, part: str) -> bool:
    r"""Whether re.match(rf"(.*\.)?({part})$", module), in a time that no hostile pattern makes long.

    >>> _ends("h.10.mlp.up", "mlp.up"), _ends("h.10.mlp.up", "p.up"), _ends("h.1.up", r"^h\.\d+.*")
    (True, False, True)
    """
    starts = () if part.startswith("^") else re.finditer(r"\.", module)
    reached = {0, *(dot.end() for dot in starts)}
    for letter, repeated in UNIT.findall(part.removeprefix("^")):
        fits = re.compile(letter).fullmatch
        after = new = {place + 1 for place in reached if fits(module[place : place + 1])}
        while repeated and new:
            new = {place + 1 for place in new if fits(module[place : place + 1])} - after
            after = after | new
        reached = after | reached if repeated == "*" else after
    return len(module) in reached


def _is_served(part: str) -> bool:
    try:
        re.compile(part)
    except re.error:
        return False
    return UNIT.sub("", part.removeprefix("^")) == ""
