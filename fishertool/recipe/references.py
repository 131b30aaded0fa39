"""Models as recipes name them."""

from fishertool.paths import expanded
from fishertool.recipe.document import Value


def parse_reference(value: Value) -> str:
    """A folder or Hub id, as one text: BASE, BASE@REVISION, BASE+ADAPTER.

    mergekit's long form {model: {path, revision}, lora: {path, revision}} becomes that text too.
    """
    if not isinstance(value.content, dict):
        return value.text()
    if "path" in value.content:
        return _parse_path(value)
    keys = value.keys(("model", "lora"))
    if "model" not in keys:
        raise value.error("needs a model")
    model = parse_reference(keys["model"])
    return f"{model}+{_parse_path(keys['lora'])}" if "lora" in keys else model


def _parse_path(value: Value) -> str:
    if not isinstance(value.content, dict):
        return value.text()
    keys = value.keys(("path", "revision"))
    if "path" not in keys:
        raise value.error("needs a path")
    path = keys["path"].text()
    return f"{path}@{keys['revision'].text()}" if "revision" in keys else path


def place_of(reference: str) -> str:
    """Alike for all spellings of one folder, or of one with one adapter; a Hub id as it is."""
    if expanded(reference).is_dir():
        return str(expanded(reference).resolve())
    base, plus, adapter = reference.partition("+")
    return f"{place_of(base)}+{place_of(adapter)}" if plus else reference
