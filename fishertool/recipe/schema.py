"""What a merge recipe says, read from YAML: mergekit's files as they are, and more."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fishertool.recipe.document import Value
from fishertool.recipe.references import parse_reference
from fishertool.recipe.settings import Settings, parse_setting, rules_of
from fishertool.recipe.tokens import TokenizerChoice, parse_source, parse_tokenizer

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "head", "include", "exclude", "seed",
)  # fmt: skip
MODULE_KEYS = ("models", "slices", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters", "fisher")
MODEL_KEYS = ("model", "parameters", "fisher")
HEADS = ("error", "merge", "keep-first")
DTYPES = ("float16", "bfloat16", "float32", "float64")
IGNORED = ("int8_mask",)
"""Parameters of mergekit's that choose how it works, not what comes out."""
IGNORED_KEYS = (*IGNORED, "name", "random_seed", "low_cpu_memory", "lazy_unpickle", "cuda")
"""What people write at the top of its files, and it passes over."""
OF_PARAMETERS = (
    "weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "t", "select_topk",
    "filter_wise", "max_iter", "tol", "scale",
)  # fmt: skip
"""Names of its methods' parameters."""
OF_MIXTURES = ("experts", "gate_mode")
"""Keys of files for mergekit-moe."""


@dataclass(frozen=True)
class Source:
    """A model, or some of its layers, with the settings that are its own."""

    model: str
    layers: tuple[int, int] | None = None
    """The first, and the one after the last; None for the whole model."""
    parameters: Settings = field(default_factory=dict)
    fisher: str | None = None
    """Its sidecar."""


@dataclass(frozen=True)
class Slice:
    """Models, or as many layers of each, that are merged into one."""

    sources: tuple[Source, ...]
    base: str | None = None
    """Where it is not the recipe's."""
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge: slices put on top of each other, or one of whole models."""

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    """Of the output; None for the first model's."""
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    head: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was read and has no effect."""
    where: str = field(default="", compare=False)
    """The file it was read from."""

    @property
    def whole(self) -> bool:
        """Whether it merges whole models, layer by layer."""
        return all(source.layers is None for one in self.slices for source in one.sources)

    @property
    def graded(self) -> bool:
        """Whether a setting changes from layer to layer."""
        scopes = [self.parameters, *(one.parameters for one in self.slices)]
        scopes += [source.parameters for one in self.slices for source in one.sources]
        settings = [setting for scope in scopes for setting in scope.values()]
        return any(isinstance(rule.value, tuple) for one in settings for rule in rules_of(one))

    @property
    def reads(self) -> list[str]:
        """Every model, base and sidecar, once."""
        named = [self.base]
        for one in self.slices:
            named += [one.base, *(source.model for source in one.sources)]
            named += [source.fisher for source in one.sources]
        return list(dict.fromkeys(name for name in named if name is not None))


def is_recipe(content: Any) -> bool:
    """Whether the content of a `--config` file is a recipe, and not a command's flags; one that
    lacks its merge_method is told by what only a recipe has."""
    if not isinstance(content, Mapping):
        return False
    models = content.get("models")
    described = isinstance(models, list) and any(isinstance(one, Mapping) for one in models)
    own = ("merge_method", "slices", "modules", "base_model")
    return described or any(key in content for key in own)


def parse_recipe(content: Any, where: str) -> Recipe:
    """A recipe from plain data; `where` is the file that messages name.

    Raises UsageError naming the file and the place in it.
    """
    document = Value(content, where)
    notes: list[str] = []
    keys = _top_keys(document, notes)
    if "merge_method" not in keys:
        raise document.error("needs a merge_method")
    parameters = _parse_parameters(keys, notes)
    for one, other in (("models", "slices"), ("models", "modules"), ("slices", "modules")):
        _refuse_both(document, keys, one, other)
    _refuse_both(document, keys, "tokenizer", "tokenizer_source")
    if "modules" in keys:
        module = _only_module(keys["modules"])
        parameters = _over(_parse_parameters(module, notes), parameters)
        keys |= module
    if "models" in keys:
        models = [_parse_source(item, MODEL_KEYS, notes) for item in keys["models"].items()]
        slices = [Slice(tuple(models))]
    elif "slices" in keys:
        slices = [_parse_slice(item, notes) for item in keys["slices"].items()]
    else:
        raise document.error("needs models or slices")
    tokenizer = parse_tokenizer(keys["tokenizer"]) if "tokenizer" in keys else None
    if "tokenizer_source" in keys:
        tokenizer = TokenizerChoice(parse_source(keys["tokenizer_source"]))
    return Recipe(
        keys["merge_method"].text().replace("_", "-"),
        tuple(slices),
        parse_reference(keys["base_model"]) if "base_model" in keys else None,
        parameters,
        _parse_dtype(keys, notes),
        tokenizer,
        keys["chat_template"].text() if "chat_template" in keys else None,
        keys["head"].word(HEADS) if "head" in keys else None,
        _parse_globs(keys, "include"),
        _parse_globs(keys, "exclude"),
        keys["seed"].whole() if "seed" in keys else 0,
        tuple(notes),
        where,
    )


def _top_keys(document: Value, notes: list[str]) -> dict[str, Value]:
    """Without those that mergekit passes over, where these are no mistake."""
    given = document.keys()
    if any(key in given for key in OF_MIXTURES):
        raise document.error("experts are for mergekit-moe; no mixture is made of models here")
    for key in given:
        if key in OF_PARAMETERS:
            raise document.error(f"{key} belongs under parameters")
    notes += [f"{key} has no effect here" for key in IGNORED_KEYS if key in given]
    rest = {key: value for key, value in document.content.items() if key not in IGNORED_KEYS}
    modules = ["modules"] if "modules" in given else []  # else it is no name to be suggested
    return Value(rest, document.file).keys([*KEYS, *modules])


def _only_module(value: Value) -> dict[str, Value]:
    """What mergekit writes of a model of one part: {default: {slices, parameters}}."""
    modules = value.keys()
    if len(modules) != 1:
        raise value.error(f"{len(modules)} modules ({', '.join(modules)}); one is supported")
    [module] = modules.values()
    keys = module.keys(MODULE_KEYS)
    _refuse_both(module, keys, "models", "slices")
    return keys


def _over(own: Settings, rest: Settings) -> Settings:
    """Settings of which the own count, and the rest where none of their rules does."""
    both = {name: rules_of(own[name]) + rules_of(rest[name]) for name in own if name in rest}
    return {**rest, **own, **both}


def _refuse_both(document: Value, keys: Mapping[str, Value], one: str, other: str) -> None:
    if one in keys and other in keys:
        raise document.error(f"{one} and {other} exclude each other")


def _parse_slice(value: Value, notes: list[str]) -> Slice:
    keys = value.keys(SLICE_KEYS)
    if "sources" not in keys:
        raise value.error("a slice needs sources")
    return Slice(
        tuple(_parse_source(item, SOURCE_KEYS, notes) for item in keys["sources"].items()),
        parse_reference(keys["base_model"]) if "base_model" in keys else None,
        _parse_parameters(keys, notes),
    )


def _parse_source(value: Value, known: tuple[str, ...], notes: list[str]) -> Source:
    if isinstance(value.content, dict) and "revision" in value.content:
        raise value.error("a revision is written as part of the model, as org/name@revision")
    keys = value.keys(known)
    for needed in ("model", "layer_range"):
        if needed in known and needed not in keys:
            raise value.error(f"needs a {needed}")
    return Source(
        parse_reference(keys["model"]),
        _parse_layers(keys["layer_range"]) if "layer_range" in keys else None,
        _parse_parameters(keys, notes),
        keys["fisher"].text() if "fisher" in keys else None,
    )


def _parse_layers(value: Value) -> tuple[int, int]:
    numbers = [item.whole() for item in value.items()]
    if len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise value.wrong("two layers, [first, one after the last]")
    return numbers[0], numbers[1]


def _parse_parameters(keys: Mapping[str, Value], notes: list[str]) -> Settings:
    if "parameters" not in keys:
        return {}
    given = keys["parameters"].keys()
    notes += [f"{given[name].place} has no effect here" for name in IGNORED if name in given]
    return {name: parse_setting(value) for name, value in given.items() if name not in IGNORED}


def _parse_dtype(keys: Mapping[str, Value], notes: list[str]) -> str | None:
    found = {}
    for key in ("dtype", "out_dtype"):
        if key in keys:
            text = keys[key].text().removeprefix("torch.")
            found[key] = Value(text, keys[key].file, keys[key].place).word(DTYPES)
    if len(set(found.values())) == 2 and found["dtype"] != "float32":
        notes.append(f"dtype {found['dtype']} has no effect here: merges are computed in float32")
    return found.get("out_dtype", found.get("dtype"))


def _parse_globs(keys: Mapping[str, Value], key: str) -> tuple[str, ...]:
    if key not in keys:
        return ()
    if isinstance(keys[key].content, str):
        return (keys[key].text(),)
    return tuple(item.text() for item in keys[key].items())
