"""Models of different tokenizers by one vocabulary, against rows looked up token by token."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.stream import pieces
from fishertool.errors import InputError, UsageError
from fishertool.merging.linear import linear
from fishertool.models.token_donors import Donor
from fishertool.models.token_rows import TokenAligned, gather, token_tensors
from fishertool.models.vocabulary import Vocabulary, match_vocabularies

FIRST = ["[UNK]", "<s>", "</s>", "the", "cat", "red", "runs"]
SECOND = ["</s>", "cat", "[UNK]", "bird", "<s>", "the", "blue"]
THIRD = ["bird", "blue", "[UNK]", "</s>", "<s>"]
ADDED = {"a": ["<tool>"], "b": ["<user>", "<tool>"], "c": []}
WORDS = {"a": FIRST, "b": SECOND, "c": THIRD}
ROWS = {"a": 8, "b": 14, "c": 5}
"""The second has more rows than tokens."""


def make_tokenizer(words: Sequence[str], added: Sequence[str]) -> Any:
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    made.add_tokens([AddedToken(token, special=True) for token in added])
    return made


def make_model(folder: Path, kind: str, name: str, dtype: torch.dtype, tied: bool) -> Path:
    torch.manual_seed(ord(name))
    tokenizer = make_tokenizer(WORDS[name], ADDED[name])
    ids = tokenizer.get_vocab()
    size = {"vocab_size": ROWS[name], "tie_word_embeddings": tied, "bos_token_id": ids["<s>"]}
    size["eos_token_id"] = ids["</s>"]
    small = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, **size}
    model: Any
    if kind == "llama":
        config: Any = transformers.LlamaConfig(intermediate_size=24, **small)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        shape = {"n_embd": 20, "n_layer": 1, "n_head": 2, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **size))
    else:
        model = transformers.BertForMaskedLM(
            transformers.BertConfig(intermediate_size=24, max_position_embeddings=32, **small)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


class Models:
    """Open models of a kind, and their tensors looked up by hand."""

    def __init__(self, opened: ExitStack, folders: Mapping[str, Path]):
        self.sources: dict[str, TensorSource] = {
            name: opened.enter_context(open_checkpoint(folder)) for name, folder in folders.items()
        }
        self.weights = {
            name: load_file(folder / "model.safetensors") for name, folder in folders.items()
        }
        self.ids = {
            name: transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
            for name, folder in folders.items()
        }

    def row(self, name: str, tensor: str, token: str) -> Tensor | None:
        id_ = self.ids[name].get(token)
        return None if id_ is None else self.weights[name][tensor][id_].double()


@pytest.fixture
def opened() -> Any:
    with ExitStack() as stack:
        yield stack


def make(
    opened: ExitStack,
    folder: Path,
    names: str,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
) -> Models:
    folders = {name: make_model(folder, kind, name, dtype, tied) for name in names}
    return Models(opened, folders)


def rows_of(source: TensorSource, name: str, piece_elements: int = 60) -> Tensor:
    info = source.info(name)
    parts = [source.read(name, one.start, one.stop) for one in pieces([info], piece_elements)]
    return torch.cat(parts).reshape(info.shape)


def view(vocabulary: Vocabulary, found: Models, name: str) -> TensorSource:
    """A model's tensors by the output's tokens."""
    source = found.sources[name]
    return TokenAligned(source, vocabulary.rows[name]) if name in vocabulary.rows else source


def check_rows(
    vocabulary: Vocabulary, found: Models, expected: Mapping[str, Sequence[str]]
) -> None:
    """`expected`: token -> models whose mean those take that lack it."""
    output = vocabulary.tokenizer.get_vocab()
    for name in found.sources:
        aligned = view(vocabulary, found, name)
        for tensor in token_tensors(found.sources[name]):
            values = rows_of(aligned, tensor).double()
            assert len(values) == vocabulary.size == aligned.info(tensor).shape[0]
            wanted = torch.zeros_like(values)
            for token, place in output.items():
                own = found.row(name, tensor, token)
                donors = [name] if own is not None else expected[token]
                rows = [found.row(donor, tensor, token) for donor in donors]
                known = [row for row in rows if row is not None]
                assert len(known) == len(donors)
                if known:
                    wanted[place] = torch.stack(known).mean(0)
            torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "tied", "expected"),
    [
        ("llama", False, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama", True, {"model.embed_tokens.weight"}),
        ("gpt2", True, {"transformer.wte.weight"}),
        ("bert", True, {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_union_without_a_base(
    opened: ExitStack,
    tmp_path: Path,
    kind: str,
    tied: bool,
    expected: set[str],
    dtype: torch.dtype,
) -> None:
    found = make(opened, tmp_path, "abc", kind, dtype, tied)
    assert token_tensors(found.sources["a"]) == expected
    vocabulary = match_vocabularies(found.sources, choice="union")
    output = vocabulary.tokenizer.get_vocab()
    assert sorted(output, key=output.__getitem__) == [
        *FIRST, "<tool>", "bird", "blue", "<user>"
    ]  # fmt: skip
    assert vocabulary.size == 11
    lacked = {"the": "ab", "cat": "ab", "red": "a", "runs": "a", "bird": "bc", "blue": "bc"}
    lacked |= {"<tool>": "ab", "<user>": "b"}
    check_rows(vocabulary, found, lacked)
    views = [view(vocabulary, found, name) for name in "abc"]
    for name in views[0]:
        merged = linear([rows_of(view, name).float() for view in views], [0.2, 0.5, 0.3])
        assert merged.shape == views[0].info(name).shape
        if name not in expected:
            assert torch.equal(rows_of(views[1], name), found.weights["b"][name])


def test_the_bases_rows_come_first(opened: ExitStack, tmp_path: Path) -> None:
    found = make(opened, tmp_path, "abc")
    vocabulary = match_vocabularies(found.sources, base="c", choice="union")
    output = vocabulary.tokenizer.get_vocab()
    assert sorted(output, key=output.__getitem__)[: len(THIRD)] == THIRD
    lacked = {"the": "ab", "cat": "ab", "red": "a", "runs": "a", "bird": "c", "blue": "c"}
    lacked |= {"<tool>": "ab", "<user>": "b"}
    check_rows(vocabulary, found, lacked)


@pytest.mark.parametrize("choice", ["base", "c"])
def test_one_models_vocabulary(opened: ExitStack, tmp_path: Path, choice: str) -> None:
    found = make(opened, tmp_path, "abc")
    vocabulary = match_vocabularies(found.sources, base="c", choice=choice)
    assert vocabulary.tokenizer.get_vocab() == found.ids["c"]
    assert "c" not in vocabulary.rows
    check_rows(vocabulary, found, {"bird": "c", "blue": "c"})
    vocabulary.write_tokenizer(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_another_folders_vocabulary(opened: ExitStack, tmp_path: Path) -> None:
    found = make(opened, tmp_path, "ab")
    make_tokenizer(["new", "cat", "[UNK]", "<s>", "</s>"], []).save_pretrained(tmp_path / "other")
    vocabulary = match_vocabularies(found.sources, choice=str(tmp_path / "other"))
    check_rows(vocabulary, found, {"new": ""})
    assert "1 tokens (new) are in no model" in vocabulary.warnings[0]


def test_donors_decide(opened: ExitStack, tmp_path: Path) -> None:
    found = make(opened, tmp_path, "ab")
    donors = {
        "cat": Donor("b", force=True),
        "red": Donor(None),
        "the": Donor(None, force=True),
        "<new>": Donor("b", "blue"),
        "bird": Donor("a", 7),
    }
    vocabulary = match_vocabularies(
        found.sources, choice="union", donors=donors, pad_to_multiple_of=8
    )
    assert vocabulary.size == 16 and vocabulary.warnings == []
    output = vocabulary.tokenizer.get_vocab()
    assert output["<new>"] == 11
    tensor = "lm_head.weight"
    first, second = (rows_of(view(vocabulary, found, name), tensor).double() for name in "ab")
    by_token = {
        "cat": (found.row("b", tensor, "cat"), found.row("b", tensor, "cat")),
        "red": (found.row("a", tensor, "red"), torch.zeros(20)),
        "the": (torch.zeros(20), torch.zeros(20)),
        "<new>": (found.row("b", tensor, "blue"), found.row("b", tensor, "blue")),
        "bird": (found.row("a", tensor, "<tool>"), found.row("b", tensor, "bird")),
        "<user>": (found.row("b", tensor, "<user>"), found.row("b", tensor, "<user>")),
    }
    for token, rows in by_token.items():
        for values, row in zip((first, second), rows, strict=True):
            assert row is not None
            assert torch.equal(values[output[token]], row.double()), token
    assert not first[12:].any() and not second[12:].any()


def test_the_written_model_loads(opened: ExitStack, tmp_path: Path) -> None:
    """All added tokens keep one id, ordinary ones take no other word apart, ids in configs follow."""
    found = make(opened, tmp_path, "bc")
    vocabulary = match_vocabularies(found.sources, base="c", choice="union")
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.txt").write_text("stale")
    vocabulary.write_tokenizer(out)
    assert not (out / "vocab.txt").exists()
    loaded: Any = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == vocabulary.tokenizer.get_vocab()
    assert loaded.added_tokens_decoder[loaded.get_vocab()["<tool>"]].special
    text = "<user>bird cat concatenate <tool>"
    tokens = ["<user>", "bird", "cat", "[UNK]", "<tool>"]
    assert loaded.convert_ids_to_tokens(loaded(text)["input_ids"]) == tokens
    config = {
        "vocab_size": 14, "bos_token_id": 4, "eos_token_id": [0, 3], "pad_token_id": None,
        "decoder_start_token_id": 1, "forced_bos_token_id": 13, "x": 1,
    }  # fmt: skip
    ids = loaded.get_vocab()
    assert vocabulary.renumbered(config, "b") == {
        "vocab_size": vocabulary.size, "bos_token_id": ids["<s>"],
        "eos_token_id": sorted([ids["</s>"], ids["bird"]]), "pad_token_id": None,
        "decoder_start_token_id": ids["cat"], "forced_bos_token_id": None, "x": 1,
    }  # fmt: skip
    nested = vocabulary.renumbered({"text_config": {"vocab_size": 14, "eos_token_id": 0}}, "b")
    assert nested == {"text_config": {"vocab_size": vocabulary.size, "eos_token_id": ids["</s>"]}}


def test_sizes_that_differ_are_refused(opened: ExitStack, tmp_path: Path) -> None:
    found = make(opened, tmp_path, "ab")
    with pytest.raises(InputError, match=r"b: has a vocabulary of 14 tokens, .*a of 8; choose"):
        match_vocabularies(found.sources)


def test_equal_sizes_of_other_tokens_are_told(opened: ExitStack, tmp_path: Path) -> None:
    found = make(opened, tmp_path, "a")
    second = shutil.copytree(tmp_path / "a", tmp_path / "x")
    sources = {**found.sources, "x": opened.enter_context(open_checkpoint(second))}
    assert match_vocabularies(sources).warnings == []
    make_tokenizer(["[UNK]", *FIRST[:0:-1]], ["<tool>"]).save_pretrained(second)
    vocabulary = match_vocabularies(sources)
    assert re.match("x: 6 tokens, </s> among them, have not the ids", vocabulary.warnings[0])
    assert not vocabulary.rows
    vocabulary.write_tokenizer(tmp_path)
    assert vocabulary.renumbered({"vocab_size": 3}, "x") == {"vocab_size": 3}


@pytest.mark.parametrize(
    ("choice", "base", "told"),
    [
        ("base", None, "needs a base"),
        ("unoin", None, "unoin"),
        ("d", "a", "'d'; known: union, base, a, b"),
    ],
)
def test_a_choice_that_is_none(
    opened: ExitStack, tmp_path: Path, choice: str, base: str | None, told: str
) -> None:
    found = make(opened, tmp_path, "ab")
    with pytest.raises(UsageError, match=told):
        match_vocabularies(found.sources, base, choice)


@pytest.mark.parametrize(
    ("donor", "told"),
    [
        (Donor("d"), "'d'; known: a, b"),
        (Donor("d", "cat"), "'d'"),
        (Donor("a", "bird"), "no token 'bird'"),
        (Donor("a", 8), "no token 8"),
        (Donor("a"), "a has no token 'bird'"),
    ],
)
def test_a_donor_that_is_none(opened: ExitStack, tmp_path: Path, donor: Donor, told: str) -> None:
    found = make(opened, tmp_path, "ab")
    with pytest.raises(UsageError, match=told):
        match_vocabularies(found.sources, choice="union", donors={"bird": donor})


def test_a_token_that_cannot_be_added(opened: ExitStack, tmp_path: Path) -> None:
    found = make(opened, tmp_path, "ab")
    with pytest.raises(UsageError, match="tokenizer: tokens: '' is no token"):
        match_vocabularies(found.sources, choice="union", donors={"": Donor("a", "cat")})


def test_what_may_be_by_token_but_is_not_known_is_refused(
    opened: ExitStack, tmp_path: Path
) -> None:
    found = make(opened, tmp_path, "ab")
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["Own"]}))
    vocabulary = match_vocabularies(found.sources, choice="union")
    with pytest.raises(InputError, match="not in transformers"):
        view(vocabulary, found, "b")
    path.write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(InputError, match=r"lm_head.weight may be by token, with 14 entries"):
        view(vocabulary, found, "b")


def test_rows_side_by_side_are_read_together() -> None:
    values = torch.arange(40.0).reshape(20, 2)
    reads = []

    class Source:
        def info(self, name: str) -> TensorInfo:
            return TensorInfo(name, "F32", (20, 2))

        def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
            reads.append((start, stop))
            return values[start:stop]

    rows = torch.tensor([7, 6, 5, 19, 0, 1, 6])
    source: Any = Source()
    assert torch.equal(gather(partial(source.read, "w"), rows), values[rows])
    assert reads == [(0, 2), (5, 8), (19, 20)]
    assert gather(partial(source.read, "w"), rows[:0]).shape == (0, 2)
