"""What the data flags are, and what data are once they are read and tokenized."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

UNSCORED = -100
"""Stands for a target where nothing is predicted, as in transformers."""
PROBE_TOKENS = 32
PADDING = 8
"""Columns, at most, by which even the longest probe is padded to see what that changes."""
TOKEN_TYPES = "token_type_ids"
"""The one input that holds no tokens."""


@dataclass(frozen=True)
class DataOptions:
    """The data flags, the same for every verb; None is the task's default."""

    data: str
    split: str = "train"
    text_column: str = "text"
    text_pair_column: str | None = None
    chat_column: str | None = None
    label_column: str = "label"
    num_examples: int | None = None
    max_length: int | None = None
    shuffle: bool = False
    seed: int = 0
    target_column: str | None = None
    query_column: str | None = None
    positive_column: str | None = None
    negative_column: str | None = None
    mask_prompt: bool = False
    mask_fraction: float | None = None
    scale: float | None = None
    in_batch_negatives: int | None = None
    select: str | None = None
    """How `num_examples` are chosen: `random` or `kmeans`; the first ones, where it is None."""
    select_from: int | None = None
    """Rows to choose from; None is all."""
    score_column: str | None = None


@dataclass(frozen=True)
class Example:
    inputs: Mapping[str, list[int]]
    """What the tokenizer gives: input_ids, and token_type_ids where the model has them; `labels`,
    the target's tokens, for a sequence-to-sequence model."""
    label: int | None
    text_bytes: int
    """UTF-8 bytes of the text that the tokens after the first stand for."""
    targets: Sequence[int] | None = None
    """A class or token for every token of the text, UNSCORED where none is predicted."""
    candidates: Sequence[Mapping[str, list[int]]] = ()
    """Of a query: inputs of the documents it is scored against, its positive first; of a sentence:
    the one it is compared with."""
    score: float | None = None
    """How much alike two sentences are, on a scale of the data's own."""

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def texts(self) -> list[Mapping[str, list[int]]]:
        return [self.inputs, *self.candidates]

    @property
    def tokens(self) -> int:
        return sum(
            len(ids) for text in self.texts for name, ids in text.items() if name != TOKEN_TYPES
        )

    @property
    def size(self) -> int:
        """Tokens it takes in a batch: its texts, all padded to the longest."""
        return len(self.texts) * max(len(ids) for text in self.texts for ids in text.values())

    def cut(self, tokens: int) -> "Example":
        """The same with so many tokens of every text at most: the first, and the last, which is
        the end of the text that some classifiers look for."""

        def short(ids: Sequence[int]) -> list[int]:
            return list(ids if len(ids) <= tokens else [*ids[: tokens - 1], ids[-1]])

        def all_short(text: Mapping[str, list[int]]) -> dict[str, list[int]]:
            return {name: short(ids) for name, ids in text.items()}

        return replace(
            self,
            inputs=all_short(self.inputs),
            targets=None if self.targets is None else short(self.targets),
            candidates=list(map(all_short, self.candidates)),
        )


def probes(examples: Sequence[Example]) -> tuple[Example, Example | None]:
    """To try a model on: a short example, of two tokens at least, or no layout of a batch can be
    told from another; and one beside which it is padded, None where all are as long."""
    shortest = min(examples, key=lambda one: (one.size < 2, one.size))
    alike = [one for one in examples if len(one.texts) == len(shortest.texts)]
    short = shortest.cut(PROBE_TOKENS)
    longer = max(alike, key=lambda one: one.size).cut(PROBE_TOKENS + PADDING)
    return short, longer if longer.size > short.size else None


@dataclass(frozen=True)
class CalibrationData:
    examples: list[Example]
    name: str
    truncated: int
    """Examples cut at the maximum length; this and the next are counted in the pool, if there is one."""
    empty: int
    """Rows left out because they have no text."""
    max_length: int
    unscored: int = 0
    """Rows left out because nothing of them would be scored."""
    why_unscored: str = ""
    labelled: bool = True
    """Whether the targets are known."""
    selection: Mapping[str, Any] | None = None
    """How the examples were chosen from a pool."""
    notes: Sequence[str] = ()
    """Of how they were read, for who runs it."""

    @property
    def tokens(self) -> int:
        return sum(example.tokens for example in self.examples)

    def fingerprint(self) -> str:
        """SHA-256 of every text's token ids, of labels, targets and scores, in order."""
        total = hashlib.sha256()
        for example in self.examples:
            label = -1 if example.label is None else example.label
            lists = [ids for text in example.texts for _, ids in sorted(text.items())]
            lists.append(list(example.targets or ()))
            if example.score is not None:
                total.update(struct.pack("<d", example.score))
            total.update(struct.pack("<qq", len(lists), label))
            for ids in lists:
                total.update(struct.pack(f"<q{len(ids)}i", len(ids), *ids))
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For reports: what exactly was read."""
        return {
            "examples": len(self.examples),
            "tokens": self.tokens,
            "max_length": self.max_length,
            "truncated": self.truncated,
            "empty": self.empty,
            "unscored": self.unscored,
            "token_ids_sha256": self.fingerprint(),
            **({} if self.selection is None else {"selection": dict(self.selection)}),
        }

    def warnings(self) -> list[str]:
        found = list(self.notes)
        if self.truncated:
            read = len(self.examples) if self.selection is None else self.selection["pool"]
            found.append(
                f"{self.truncated} of {read} examples were cut at {self.max_length} tokens"
            )
        if self.empty:
            found.append(f"{self.empty} rows without text were left out")
        if self.unscored:
            found.append(f"{self.unscored} rows were left out: {self.why_unscored}")
        return found
