"""The chat template of a merge: one of its models', or another."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fishertool.checkpoint.json_files import load_json
from fishertool.errors import InputError, UsageError
from fishertool.paths import expanded

FILE = "chat_template.jinja"
AUTO = "auto"
NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
        "{{ message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set start = namespace(text='[INST] ') %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}"
        "{% set start.text = '[INST] ' + message.content + '\n\n' %}"
        "{% elif message.role == 'user' %}"
        "{{ start.text + message.content + ' [/INST]' }}{% set start.text = '[INST] ' %}"
        "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
        "{% elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message.content + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message.role != 'system' %}"
        "{{ '[|system|][|endofturn|]\n' }}"
        "{% endif %}"
        "{{ '[|' + message.role + '|]' + message.content }}"
        "{{ '\n' if message.role == 'user' else '[|endofturn|]\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}
"""Common formats by the names that mergekit gives them. Their spaces are those of the models that were
trained so, where mergekit's own files have others."""


def choose_template(choice: str, folders: Iterable[Path]) -> str:
    """`auto`: the one most models have, of as many the first; else a name of NAMED, a Jinja file, or
    its text.

    Raises UsageError for what is neither, InputError where no model has a template.
    """
    if choice == AUTO:
        found = Counter(text for text in map(template_of, folders) if text is not None)
        if not found:
            raise InputError("chat_template auto: none of the models has a chat template")
        return found.most_common(1)[0][0]
    if choice in NAMED:
        return NAMED[choice]
    if "{{" in choice or "{%" in choice:
        return choice
    path = expanded(choice)
    if not path.is_file():
        raise UsageError(
            f"chat_template {choice!r} is none of {', '.join([AUTO, *NAMED])}, nor a file, nor the "
            "text of a template"
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
