"""Prompts and completions: the prompt is read, the completion alone is scored."""

from collections.abc import Iterator, Mapping
from typing import Any

from fishertool.calibration.data import UNSCORED, Example
from fishertool.calibration.reader import Reader, inputs_of


def completed(reader: Reader) -> Iterator[Example]:
    """One text of prompt and completion; tokens that end within the prompt are not scored.

    A conversation ends with its last assistant message, which is the completion. In plain columns
    the completion follows the prompt as it stands, so white space between them is in one of them.
    """
    reader.fast("--mask-prompt")
    chat = reader.options.chat_column
    for row in reader:
        prompt, completion = _plain(reader, row) if chat is None else _chat(reader, row[chat])
        if not prompt.strip() and not completion.strip():
            reader.empty += 1
            continue
        encoded, cut = reader.encode(prompt + completion, add_special_tokens=chat is None)
        tokens = list(encoded["input_ids"])
        spans = enumerate(encoded["offset_mapping"])
        first = next(
            (place for place, (start, stop) in spans if stop > max(start, len(prompt))),
            len(tokens),
        )
        first = max(first, 1)  # nothing is before the first token to predict it from
        if not completion.strip() or first >= len(tokens):
            reader.unscored += 1
            continue
        reader.truncated += cut
        yield Example(inputs_of(encoded), None, 0, [UNSCORED] * first + tokens[first:])


def _plain(reader: Reader, row: Mapping[str, Any]) -> tuple[str, str]:
    options = reader.options
    return reader.text(row, options.text_column), reader.text(row, str(options.text_pair_column))


def _chat(reader: Reader, messages: Any) -> tuple[str, str]:
    """Up to where the last answer begins, and the answer with what the template ends it with."""
    try:
        places = [n for n, one in enumerate(messages or ()) if one["role"] == "assistant"]
    except (TypeError, KeyError) as error:
        raise reader.refusal("its conversation is not a list of messages with a role") from error
    if not places:
        return reader.chat(messages), ""
    before = messages[: places[-1]]
    text = reader.chat(messages[: places[-1] + 1])
    for prompt in (True, False):
        read = reader.chat(before, prompt) if before else ""
        if text.startswith(read):
            return read, text[len(read) :]
    raise reader.refusal(
        "the chat template writes what comes before the last assistant message otherwise without "
        "it; give prompts and completions in --text-column and --text-pair-column"
    )
