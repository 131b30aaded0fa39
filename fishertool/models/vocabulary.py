"""Models of different tokenizers by one vocabulary: which tokens the output has, and whose rows."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool import hub
from fishertool.checkpoint.companions import find_companions
from fishertool.checkpoint.source import TensorSource
from fishertool.errors import InputError, UsageError, some
from fishertool.models.loading import TOKENIZER_FILES, load_tokenizer
from fishertool.models.token_donors import Donor, donated_rows, known
from fishertool.models.token_rows import TokenRows

OF_TOKENIZERS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template.*",
)  # fmt: skip
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
"""Tokens that a tokenizer knows; config.json has the ids of some."""
WAY_OUT = "choose the merge's tokens by tokenizer: {source: union}, or base, or one of the models"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a merge; every model as it is where nothing was chosen."""

    tokenizer: Any = None
    """The output's; None leaves all as it is."""
    size: int = 0
    """Rows of its embeddings."""
    copied_from: Path | None = None
    """Where the tokenizer's files are, if it is a model's as it is."""
    rows: Mapping[str, TokenRows] = field(default_factory=dict)
    """Of each model whose rows are not the output's already."""
    tokens: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Each model's, with their ids."""
    warnings: Sequence[str] = ()

    def write_tokenizer(self, out: Path) -> None:
        """Put the tokenizer's files into a folder, in place of any that are there."""
        if self.tokenizer is None:
            return
        for name in tokenizer_files(out):
            (out / name).unlink()
        if self.copied_from is None:
            self.tokenizer.save_pretrained(out)
        else:
            for name in tokenizer_files(self.copied_from):
                shutil.copyfile(self.copied_from / name, out / name)

    def renumbered(self, config: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A model's config.json or generation_config.json, by the output's size and ids.

        Tokens that the output's tokenizer knows by role are its own; others keep their token.
        """
        changed = dict(config)
        if self.tokenizer is None:
            return changed
        if "vocab_size" in changed:
            changed["vocab_size"] = self.size
        if isinstance(changed.get("text_config"), dict):
            changed["text_config"] = self.renumbered(changed["text_config"], name)
        output = self.tokenizer.get_vocab()
        token_of = {id_: token for token, id_ in self.tokens[name].items()}
        for key, value in config.items():
            if not key.endswith("_token_id") or value is None:
                continue
            known_id = getattr(self.tokenizer, key) if key[: -len("_token_id")] in ROLES else None
            own = [] if known_id is None else [known_id]
            before = value if isinstance(value, list) else [value]
            kept = [output[token_of[one]] for one in before if token_of.get(one) in output]
            if isinstance(value, list):
                changed[key] = sorted({*own, *kept})
            else:
                changed[key] = next(iter(own + kept), None)
        return changed


def match_vocabularies(
    sources: Mapping[str, TensorSource],
    base: str | None = None,
    choice: str | None = None,
    donors: Mapping[str, Donor] | None = None,
    pad_to_multiple_of: int | None = None,
    trust_remote_code: bool = False,
) -> Vocabulary:
    """The vocabulary of a merge of `sources` (the base among them, if there is one).

    `choice` None keeps all as it is and refuses models of different sizes; else it is `union`: the
    base's or first's tokens, and then all that the others have; `base`; one of the models; or
    another folder or Hub id. A model that lacks a token takes the row of the base if that has it,
    else the mean of those which have it, else zero; `donors` decide otherwise, and add their
    tokens to the tokenizer.

    Raises InputError for sizes that differ, and for a tokenizer that cannot be loaded; UsageError
    for names of no model and tokens of no row.
    """
    if choice is None:
        if donors or pad_to_multiple_of:
            raise UsageError("tokenizer: tokens and pad_to_multiple_of need a source")
        return _as_they_are(sources, trust_remote_code)
    folder = _chosen(sources, base, choice)
    loaded = {name: load_tokenizer(one.folder, trust_remote_code) for name, one in sources.items()}
    tokens = {name: tokenizer.get_vocab() for name, tokenizer in loaded.items()}
    tokenizer = load_tokenizer(folder, trust_remote_code)
    before = tokenizer.get_vocab()
    if choice == "union":
        for one in loaded.values():
            _add_tokens(tokenizer, one)
    tokenizer.add_tokens([token for token in donors or {} if token not in tokenizer.get_vocab()])
    output = tokenizer.get_vocab()
    if unknown := [token for token in donors or {} if token not in output]:
        raise UsageError(f"tokenizer: tokens: {unknown[0]!r} is no token that can be added")
    step = pad_to_multiple_of or 1
    size = -(-(max(output.values()) + 1) // step) * step
    sizes = {name: _rows(source) for name, source in sources.items()}
    own = {name: _row_map(tokens[name], output, size, sizes[name]) for name in sources}
    given, forced = donated_rows(own, base, donors or {}, output, tokens, sizes)
    aligned = {}
    for name in sources:
        mine = own[name].masked_fill(forced, -1)
        if not torch.equal(mine, torch.arange(sizes[name])):
            aligned[name] = TokenRows(mine, [(sources[one], rows) for one, rows in given.items()])
    nowhere = (torch.stack([*own.values()]).amax(0) < 0).tolist()
    homeless = sorted(
        t for t, place in output.items() if nowhere[place] and t not in (donors or {})
    )
    told = f"{len(homeless)} tokens ({some(homeless)}) are in no model: their rows are zero"
    return Vocabulary(
        tokenizer, size, folder if output == before else None, aligned, tokens,
        [told] if homeless else [],
    )  # fmt: skip


def _chosen(sources: Mapping[str, TensorSource], base: str | None, choice: str) -> Path:
    """Where the tokenizer is that is taken, or that comes first."""
    if choice == "base" and base is None:
        raise UsageError("tokenizer source base needs a base")
    if choice in ("union", "base"):
        return sources[base or next(iter(sources))].folder
    if choice not in sources and hub.may_be(choice):
        return hub.resolve(choice)
    return sources[known(choice, ["union", "base", *sources], "tokenizer source")].folder


def _add_tokens(tokenizer: Any, other: Any) -> None:
    """Append what another tokenizer has more, in its order.

    Ordinary tokens match whole words only: "cat" must not take "concatenate" apart.
    """
    from transformers import AddedToken

    added, present = other.added_tokens_decoder, tokenizer.get_vocab()
    tokenizer.add_tokens(
        [
            added.get(id_) or AddedToken(token, single_word=True, normalized=True)
            for token, id_ in sorted(other.get_vocab().items(), key=lambda item: item[1])
            if token not in present
        ]
    )


def _row_map(tokens: Mapping[str, int], output: Mapping[str, int], size: int, rows: int) -> Tensor:
    """[output row] -> the row of the same token in a model of so many rows, or -1."""
    own = torch.full((size,), -1)
    places = torch.tensor(list(output.values()))
    found = torch.tensor([tokens.get(token, -1) for token in output])
    own[places] = found.masked_fill(found >= rows, -1)
    return own


def _rows(source: TensorSource) -> int:
    """Tokens the model embeds."""
    size = _size(source)
    if size is None:
        raise InputError(f"{source.folder / 'config.json'}: has no vocab_size")
    return size


def _size(source: TensorSource) -> int | None:
    config = source.config()
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def _as_they_are(sources: Mapping[str, TensorSource], trust_remote_code: bool) -> Vocabulary:
    first, *others = sources.values()
    for other in others:
        if _size(other) != _size(first):
            raise InputError(
                f"{other.folder}: has a vocabulary of {_size(other)} tokens, {first.folder} of "
                f"{_size(first)}; {WAY_OUT}"
            )
    told = []
    for other in others:
        files = [_contents(one.folder) for one in (first, other)]
        if not all(files) or files[0] == files[1]:
            continue
        try:
            mine, theirs = (
                load_tokenizer(one.folder, trust_remote_code).get_vocab() for one in (first, other)
            )
        except InputError as error:  # the merge does without
            told.append(f"{error}; whether an id is the same token in all models is not checked")
            continue
        differ = sorted(t for t in {*mine, *theirs} if mine.get(t) != theirs.get(t))
        if differ:
            told.append(
                f"{other.folder.name}: {len(differ)} tokens, {differ[0]} among them, have not the "
                f"ids they have in {first.folder.name}, but rows are merged by id; {WAY_OUT}"
            )
    return Vocabulary(warnings=told)


def _contents(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def tokenizer_files(folder: Path) -> list[str]:
    """Names of those that make up a model's tokenizer."""
    return [
        name
        for name in find_companions(folder).copied
        if any(fnmatchcase(name, pattern) for pattern in OF_TOKENIZERS)
    ]
