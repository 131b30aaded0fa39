"""The chat template of a merge: one of its models', or another."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fishertool.checkpoint.json_files import load_json
from fishertool.errors import InputError, UsageError
from fishertool.paths import expanded

FILE = "chat_template.jinja"
AUTO = "auto"


def choose_template(choice: str, folders: Iterable[Path]) -> str:
    """`auto`: the one most models have, of as many the first; else a Jinja file, or its text.

    Raises UsageError for what is neither, InputError where no model has a template.
    """
    if choice == AUTO:
        found = Counter(text for text in map(template_of, folders) if text is not None)
        if not found:
            raise InputError("chat_template auto: none of the models has a chat template")
        return found.most_common(1)[0][0]
    if "{{" in choice or "{%" in choice:
        return choice
    path = expanded(choice)
    if not path.is_file():
        raise UsageError(
            f"chat_template {choice!r} is neither auto, nor a file, nor the text of a template"
        )
    return _text_of(path)


def template_of(folder: Path) -> str | None:
    """A model's template, from its own file or its tokenizer's."""
    path = folder / FILE
    if path.is_file():
        return _text_of(path)
    config = folder / "tokenizer_config.json"
    text = load_json(config).get("chat_template") if config.is_file() else None
    return text if isinstance(text, str) else None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text: {error}") from error
