"""YAML files as plain data, each value with its place for messages; hostile files are refused."""

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fishertool.errors import UsageError
from fishertool.paths import expanded
from fishertool.registry import suggest

MOST_BYTES = 200_000
MOST_VALUES = 100_000
DEEPEST = 30
HALF = re.compile("[\ud800-\udfff]")
"""Lone surrogates, which an escape can make and no file can hold."""


BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML silently takes the last, and says of a value
    that is not of its type where it is. 2:4 is what it says, and not 124."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and BASE_60.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{reprlib.repr(node.value)} is not of the type {kind}",
                problem_mark=node.start_mark,
            ) from error

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def read_document(path: Path) -> Any:
    """The plain data of a YAML file. Raises UsageError, in one line, for what is none."""
    try:
        with expanded(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"{path}: more than {MOST_BYTES:,} bytes; a recipe is a short file")
    try:
        loader = _Loader(content.decode("utf-8"))
        root = loader.get_single_node()
        if root is None:
            return None
        _weigh(root, {})
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if isinstance(error, yaml.composer.ComposerError) and "single document" in (
            error.context or ""
        ):
            raise UsageError(
                f"{path}: {place}a second document begins; give each a file of its own"
            ) from error
        raise UsageError(f"{path}: {place}{error.problem or error.context}") from error
    except RecursionError:
        raise UsageError(f"{path}: nested more than {DEEPEST} deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def _weigh(node: Any, known: dict[int, int], depth: int = 0) -> int:
    """How many values a node stands for, with every anchor written out."""
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in known:
        inside: Iterable[Any] = ()
        if isinstance(node, yaml.MappingNode):
            inside = (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif not node.value.isascii() and HALF.search(node.value):
            raise yaml.MarkedYAMLError(
                problem="a text has half a character", problem_mark=node.start_mark
            )
        known[id(node)] = 1 + sum(_weigh(part, known, depth + 1) for part in inside)
    if known[id(node)] > MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MOST_VALUES:,} values", problem_mark=node.start_mark
        )
    return known[id(node)]


@dataclass(frozen=True)
class Value:
    """A value of a document, with the file and the place in it that a message names."""

    content: Any
    file: str
    place: str = ""

    def error(self, problem: str) -> UsageError:
        return UsageError(": ".join(part for part in (self.file, self.place, problem) if part))

    def wrong(self, wanted: str) -> UsageError:
        return self.error(f"{reprlib.repr(self.content)} is not {wanted}")

    def keys(self, known: Iterable[str] | None = None) -> dict[str, "Value"]:
        """The values of a mapping by key; one that is null counts as not given."""
        if not isinstance(self.content, dict):
            raise self.wrong("a mapping of keys to values")
        values = {}
        for key, content in self.content.items():
            if not isinstance(key, str):
                raise self.error(f"the key {reprlib.repr(key)} is not a text")
            if known is not None and key not in known:
                raise self.error(f"no key {suggest(key, known)}")
            if content is not None:
                place = f"{self.place}.{key}" if self.place else key
                values[key] = Value(content, self.file, place)
        return values

    def items(self) -> list["Value"]:
        if not isinstance(self.content, list) or not self.content:
            raise self.wrong("a list with something in it")
        return [
            Value(content, self.file, f"{self.place}[{index}]")
            for index, content in enumerate(self.content)
        ]

    def text(self) -> str:
        if not isinstance(self.content, str) or not self.content:
            raise self.wrong("a text")
        return self.content

    def flag(self) -> bool:
        if not isinstance(self.content, bool):
            raise self.wrong("true or false")
        return self.content

    def whole(self, least: int = 0, most: int | None = None) -> int:
        """A whole number of at least `least`, and at most `most`."""
        number = self.content
        if type(number) is not int or number < least or (most is not None and number > most):
            limit = "" if most is None else f" and at most {most}"
            raise self.wrong(f"a whole number of at least {least}{limit}")
        return number

    def word(self, known: Iterable[str]) -> str:
        text = self.text()
        if text not in known:
            raise self.error(suggest(text, known))
        return text
