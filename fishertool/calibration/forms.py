"""The forms data have, one a task: which columns and flags, and how rows become examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fishertool.calibration import prompts, ranking, texts
from fishertool.calibration.choice import check_choice
from fishertool.calibration.classes import have_names, ids_by_name, names_in
from fishertool.calibration.data import CalibrationData, DataOptions, Example
from fishertool.calibration.reader import Reader, length_limit
from fishertool.calibration.rows import name_of, read_rows
from fishertool.errors import InputError, UsageError, some


@dataclass(frozen=True)
class Form:
    flags: Mapping[str, Any]
    """Fields of DataOptions it has a use for, of those not every form has, and their defaults."""
    columns: Callable[[DataOptions], Sequence[str | None]]
    """Those that must be there; None is none."""
    read: Callable[[Reader], Iterator[Example]]
    why_unscored: str = ""

    def resolve(self, options: DataOptions, task: str) -> DataOptions:
        """The options with this form's defaults.

        Raises UsageError for a flag that the form has no use for, or a value out of range.
        """
        of_some_form = {name for form in FORMS.values() for name in form.flags}
        for field in fields(DataOptions):
            foreign = field.name in of_some_form - set(self.flags)
            if foreign and getattr(options, field.name) != field.default:
                uses = ", ".join(map(_flag, self.flags))
                raise UsageError(f"{_flag(field.name)} is not for {task}, which takes {uses}")
        check_choice(options)
        if options.mask_fraction is not None and not 0 < options.mask_fraction <= 1:
            raise UsageError(f"--mask-fraction {options.mask_fraction}: is above 0 and at most 1")
        if options.scale is not None and not 0 < options.scale < float("inf"):
            raise UsageError(f"--scale {options.scale}: is a number above 0")
        if options.in_batch_negatives is not None and options.in_batch_negatives < 2:
            raise UsageError(f"--in-batch-negatives {options.in_batch_negatives}: is at least 2")
        one_of = (options.chat_column is None) != (options.text_pair_column is None)
        if options.mask_prompt and not one_of:
            raise UsageError(
                "--mask-prompt: give --chat-column, or --text-pair-column with the completion of "
                "--text-column"
            )
        missing = [name for name in self.flags if getattr(options, name) is None]
        return replace(options, **{name: self.flags[name] for name in missing})


TEXT = {"text_column": "text"}
FORMS = {
    "labelled texts": Form(
        {**TEXT, "text_pair_column": None, "chat_column": None, "label_column": "label"},
        lambda options: (options.chat_column or options.text_column, options.text_pair_column),
        texts.whole,
    ),
    "labelled words": Form(
        {**TEXT, "label_column": "label"},
        lambda options: (options.text_column,),
        texts.words,
        "they have no word within the maximum length",
    ),
    "masked texts": Form(
        {**TEXT, "text_pair_column": None, "mask_fraction": 0.15},
        lambda options: (options.text_column, options.text_pair_column),
        texts.masked,
        "they have no token that could be masked",
    ),
    "texts": Form(
        {**TEXT, "text_pair_column": None, "chat_column": None, "mask_prompt": False},
        lambda options: (options.chat_column or options.text_column, options.text_pair_column),
        lambda reader: (prompts.completed if reader.options.mask_prompt else texts.whole)(reader),
        "they have no completion, or none within the maximum length",
    ),
    "texts and targets": Form(
        {**TEXT, "target_column": "target"},
        lambda options: (options.text_column, options.target_column),
        texts.targeted,
    ),
    "queries": Form(
        {
            "query_column": "query",
            "positive_column": "positive",
            "negative_column": None,  # `negative` where there is one
            "in_batch_negatives": None,  # 8 where there is no negative column
            "scale": 20.0,
        },
        lambda options: (options.query_column, options.positive_column, options.negative_column),
        ranking.queries,
        "their queries have no candidate besides the positive",
    ),
    "scored pairs": Form(
        {**TEXT, "text_pair_column": None, "score_column": None},
        lambda options: (options.text_column, options.text_pair_column, options.score_column),
        texts.scored_pairs,
    ),
}


def load(
    options: DataOptions,
    tokenizer: Any,
    model_limit: int | None,
    labels: Mapping[str, int] | None,
    form: Form,
    *,
    need_labels: bool = False,
    long_texts: Literal["cut", "keep"] = "cut",
) -> CalibrationData:
    """Read and tokenize the data, by options that the form has resolved.

    labels       class names -> ids of the model's head, or None if it has none
    need_labels  whether a missing label column is an error
    long_texts   `keep` leaves texts longer than the limit whole, for who splits them

    Raises InputError naming the file and row or column, HubError if a dataset cannot be had.
    """
    rows = read_rows(options)
    with_labels = labels is not None and options.label_column in rows.column_names
    for column in [*form.columns(options), options.label_column if need_labels else None]:
        if column is not None and column not in rows.column_names:
            has = ", ".join(map(repr, rows.column_names))
            raise InputError(f"{options.data}: no column {column!r}; it has {has}")
    limit = length_limit(options, tokenizer, model_limit)
    known = labels if with_labels else None
    classes, notes = _classes(rows, options.label_column, known)
    reader = Reader(rows, options, tokenizer, limit, known, long_texts == "cut", classes)
    examples = list(form.read(reader))
    if not examples:
        why = "no rows with text in it"
        if reader.unscored:
            why = f"nothing to score in its {reader.unscored} rows with text: {form.why_unscored}"
        raise InputError(f"{options.data}: {why}")
    return CalibrationData(
        examples,
        name_of(options),
        reader.truncated,
        reader.empty,
        limit,
        reader.unscored,
        form.why_unscored,
        labelled=labels is None or with_labels,
        notes=notes,
    )


def _classes(
    rows: Any, column: str, labels: Mapping[str, int] | None
) -> tuple[list[int] | None, list[str]]:
    """Of each class id of the data the model's, by their names; None where they are the same ids.

    And what to say where names do not tell.
    """
    names = None if labels is None else names_in(rows, column)
    if labels is None or names is None or not have_names(labels):
        return None, []
    if found := ids_by_name(names, labels):
        return found, []
    told = (
        f"the classes of {column} ({some(names)}) are not all of the model's "
        f"({some(list(labels))}): they are taken by their numbers"
    )
    return None, [told]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
