"""What opens as a model: bases with adapters, against the same merged by definition in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAKERS, Cli, ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.stream import pieces
from fishertool.errors import InputError
from fishertool.models.sources import open_source, split_reference
from fishertool.sidecar import open_sidecar

PREFIX = "base_model.model."
QUERY = "bert.encoder.layer.0.attention.self.query"
DENSE = "bert.encoder.layer.1.intermediate.dense"
WORDS = "bert.embeddings.word_embeddings"
CONV = "transformer.h.0.attn.c_attn"
SQUARE_CONV = "transformer.h.1.attn.c_proj"
ATTENTION = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def pair(module: str, out: int, width: int, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": 0.3 * torch.randn(rank, width, generator=generator),
        f"{module}.lora_B.weight": 0.3 * torch.randn(out, rank, generator=generator),
    }


def rows_of(source: TensorSource, name: str, piece_elements: int = 40) -> Tensor:
    """A tensor put together of pieces that begin anywhere."""
    info = source.info(name)
    parts = [source.read(name, one.start, one.stop) for one in pieces([info], piece_elements)]
    return torch.cat(parts).reshape(info.shape)


def delta(tensors: dict[str, Tensor], module: str, scale: float) -> Tensor:
    down, up = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    return scale * up @ down


def check_merged(base: Path, adapter: Path, expected: dict[str, Tensor]) -> None:
    """The view has the expected tensors, and the base's own bytes everywhere else."""
    with open_source(f"{base}+{adapter}") as source, open_checkpoint(base) as plain:
        assert list(source) == list(plain)
        for name in source:
            assert source.info(name) == plain.info(name)
            found = rows_of(source, name)
            if name in expected:
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found, plain[name])


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_rank_is_added_in_float32(
    make_model: ModelMaker, tmp_path: Path, dtype: torch.dtype, stabilised: bool
) -> None:
    base = make_model("base", dtype=dtype, spread=0.1)
    weights = load_file(base / "model.safetensors")
    tensors = pair(QUERY, 16, 16, seed=1) | pair(DENSE, 32, 16, rank=2, seed=2)
    adapter = write_adapter(
        tmp_path / "lora", tensors, use_rslora=stabilised,
        rank_pattern={"dense": 2}, alpha_pattern={r"layer\.1\.\w+\.dense": 5},
    )  # fmt: skip
    scales = (6 / 4**0.5, 5 / 2**0.5) if stabilised else (6 / 4, 5 / 2)
    expected = {
        f"{module}.weight": weights[f"{module}.weight"].double() + delta(tensors, module, scale)
        for module, scale in zip((QUERY, DENSE), scales, strict=True)
    }
    check_merged(base, adapter, expected)


def test_dora_gives_each_output_its_length(make_model: ModelMaker, tmp_path: Path) -> None:
    """m (W + s B A) / ||W + s B A||, the norm of an output's row."""
    base = make_model("base", spread=0.1)
    weight = load_file(base / "model.safetensors")[f"{DENSE}.weight"]
    tensors = pair(DENSE, 32, 16)
    lengths = torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5
    named = {**tensors, f"{DENSE}.lora_magnitude_vector": lengths}
    adapter = write_adapter(tmp_path / "dora", named, use_dora=True)
    whole = weight.double() + delta(tensors, DENSE, 6 / 4)
    expected = lengths.double()[:, None] * whole / whole.square().sum(1, keepdim=True).sqrt()
    check_merged(base, adapter, {f"{DENSE}.weight": expected})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_gpt2_weights_are_in_by_out(
    make_model: ModelMaker, tmp_path: Path, dora: bool, told: bool
) -> None:
    """Whatever the file says of fan_in_fan_out: the last layer that peft wrapped decides that."""
    base = make_model("base", "gpt2", spread=0.1)
    weights = load_file(base / "model.safetensors")
    tensors = pair(CONV, 48, 16) | pair(SQUARE_CONV, 16, 16, seed=1)
    named, expected = dict(tensors), {}
    for module, out in ((CONV, 48), (SQUARE_CONV, 16)):
        whole = weights[f"{module}.weight"].double().T + delta(tensors, module, 6 / 4)
        if dora:
            lengths = torch.rand(out, generator=torch.Generator().manual_seed(out)) + 0.5
            named[f"{module}.lora_magnitude_vector"] = lengths
            norms = whole.square().sum(1, keepdim=True).sqrt()
            whole = lengths.double()[:, None] * whole / norms
        expected[f"{module}.weight"] = whole.T
    adapter = write_adapter(tmp_path / "a", named, use_dora=dora, fan_in_fan_out=told)
    check_merged(base, adapter, expected)


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_biases_and_whole_modules(
    make_model: ModelMaker, tmp_path: Path, dora: bool
) -> None:
    """An embedding's outputs are its columns; biases are added or replaced; heads are replaced."""
    base = make_model("base", spread=0.1)
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    words, width = weights[f"{WORDS}.weight"].shape
    down, up = (
        torch.randn(4, words, generator=generator),
        torch.randn(width, 4, generator=generator),
    )
    query = pair(QUERY, 16, 16)
    added, replaced = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    head = {
        "classifier.weight": torch.randn(3, 16, generator=generator),
        "classifier.bias": torch.randn(3, generator=generator),
    }
    lengths = {
        f"{WORDS}.lora_magnitude_vector": torch.rand(width, generator=generator) + 0.5,
        f"{QUERY}.lora_magnitude_vector": torch.rand(16, generator=generator) + 0.5,
    }
    tensors = {
        f"{WORDS}.lora_embedding_A": down,
        f"{WORDS}.lora_embedding_B": up,
        **query,
        f"{QUERY}.lora_B.bias": added,
        "bert.encoder.layer.0.attention.self.key.base_layer.bias": replaced,
        "classifier.modules_to_save.weight": head["classifier.weight"],
        "classifier.bias": head["classifier.bias"],
        "classifier.original_module.bias": torch.zeros(3),
        **(lengths if dora else {}),
    }
    adapter = write_adapter(
        tmp_path / "a", tensors, use_dora=dora, bias="lora_only", lora_bias=True,
        modules_to_save=["classifier", "score"],
    )  # fmt: skip
    scale = 6 / 4
    embedded = weights[f"{WORDS}.weight"].double() + scale * (up.double() @ down.double()).T
    queried = weights[f"{QUERY}.weight"].double() + delta(query, QUERY, scale)
    if dora:
        by_column, by_row = (one.double() for one in lengths.values())
        embedded = by_column * embedded / embedded.square().sum(0).sqrt()
        queried = by_row[:, None] * queried / queried.square().sum(1, keepdim=True).sqrt()
    expected = {
        f"{WORDS}.weight": embedded,
        f"{QUERY}.weight": queried,
        f"{QUERY}.bias": weights[f"{QUERY}.bias"].double() + scale * added.double(),
        "bert.encoder.layer.0.attention.self.key.bias": replaced.double(),
        **{name: tensor.double() for name, tensor in head.items()},
    }
    check_merged(base, adapter, expected)


def test_names_may_lack_the_base_models_prefix(make_model: ModelMaker, tmp_path: Path) -> None:
    base = make_model("base", "llama", spread=0.1)
    weights = load_file(base / "model.safetensors")
    bare = ATTENTION.removeprefix("model.")
    adapter = write_adapter(tmp_path / "a", pair(bare, 16, 16))
    whole = weights[f"{ATTENTION}.weight"].double() + delta(pair(bare, 16, 16), bare, 6 / 4)
    check_merged(base, adapter, {f"{ATTENTION}.weight": whole})
    stripped = {name.removeprefix("model."): one for name, one in weights.items()}
    stripped.pop("lm_head.weight")
    save_file(stripped, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    full = write_adapter(tmp_path / "b", pair(ATTENTION, 16, 16))
    whole = weights[f"{ATTENTION}.weight"].double() + delta(pair(bare, 16, 16), bare, 6 / 4)
    check_merged(base, full, {f"{bare}.weight": whole})


def test_an_architecture_of_its_own_is_matched_by_names(
    make_model: ModelMaker, tmp_path: Path
) -> None:
    """Where transformers cannot tell, the file's fan_in_fan_out does."""
    base = make_model("base", "gpt2", spread=0.1)
    weight = load_file(base / "model.safetensors")[f"{SQUARE_CONV}.weight"]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["Own"]}))
    tensors = pair(SQUARE_CONV, 16, 16)
    for turned in (False, True):
        added = delta(tensors, SQUARE_CONV, 6 / 4)
        adapter = write_adapter(tmp_path / f"{turned}", tensors, fan_in_fan_out=turned)
        expected = weight.double() + (added.T if turned else added)
        check_merged(base, adapter, {f"{SQUARE_CONV}.weight": expected})


def test_a_float8_base_is_read_in_float32(make_model: ModelMaker, tmp_path: Path) -> None:
    base = make_model("base")
    weights = load_file(base / "model.safetensors")
    weights[f"{QUERY}.weight"] = weights[f"{QUERY}.weight"].to(torch.float8_e4m3fn)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    tensors = pair(QUERY, 16, 16)
    adapter = write_adapter(tmp_path / "a", tensors)
    stored = weights[f"{QUERY}.weight"].to(torch.float64)
    check_merged(base, adapter, {f"{QUERY}.weight": stored + delta(tensors, QUERY, 6 / 4)})


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (pair(f"{QUERY}x", 16, 16), {}, r"queryx.weight \(\[16, 16\] here, not there\)"),
        (pair(QUERY, 32, 16), {}, r"query.weight \(\[32, 16\] here, \[16, 16\] there\)"),
        ({"score.weight": torch.ones(2, 16)}, {}, "score.weight"),
        (pair(QUERY, 16, 16), {"r": 2}, "gives rank 2"),
        (pair(QUERY, 16, 16), {"use_dora": True}, "magnitudes"),
        (pair(QUERY, 16, 16), {"target_parameters": ["x"]}, "target_parameters"),
        (pair(QUERY, 16, 16), {"init_lora_weights": "olora"}, "path_initial_model_for_weight"),
        (
            {
                **pair(QUERY, 16, 16),
                f"{QUERY}.lora_magnitude_vector": torch.ones(3),
            },
            {"use_dora": True},
            r"is \[3\] for 16 outputs",
        ),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    make_model: ModelMaker,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    told: str,
) -> None:
    base = make_model("base")
    adapter = write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(InputError, match=told), open_source(f"{base}+{adapter}"):
        pass


def test_one_side_of_a_tie_cannot_be_changed(make_model: ModelMaker, tmp_path: Path) -> None:
    base = make_model("base", "llama", tied=True)
    shape = load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape
    adapter = write_adapter(tmp_path / "a", {"model.embed_tokens.weight": torch.ones(shape)})
    with pytest.raises(InputError, match="ties"), open_source(f"{base}+{adapter}"):
        pass


def test_an_adapter_alone_names_its_base(make_model: ModelMaker, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", pair(QUERY, 16, 16), base_model_name_or_path="org/base")
    with pytest.raises(InputError, match=r"is an adapter of org/base; write BASE\+"):
        open_source(str(adapter)).__enter__()


@pytest.mark.parametrize(
    ("reference", "told"),
    [("a+", "has no name; write BASE, or BASE.ADAPTER"), ("+a", "has no name"), ("", "has no name"),
     ("a+a", "a: is no adapter; it has no adapter_config.json")],
)  # fmt: skip
def test_half_a_reference_and_what_is_no_adapter_are_refused(
    make_model: ModelMaker,
    reference: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    make_model("a")
    monkeypatch.chdir(tmp_path / "a")  # which is a model as well
    (tmp_path / "a" / "a").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match=told), open_source(reference):
        pass


def test_plus_and_at_in_folder_names(make_model: ModelMaker, tmp_path: Path) -> None:
    base, adapter = tmp_path / "a+b@1", tmp_path / "c+d"
    make_model("a+b@1")
    write_adapter(adapter, pair(QUERY, 16, 16))
    assert split_reference(str(base)) == (str(base), None)
    assert split_reference(f"{base}+{adapter}") == (str(base), str(adapter))
    assert split_reference(f"org/base+{adapter}") == ("org/base", str(adapter))
    assert split_reference("org/base@v1+org/lora@refs/pr/1") == (
        "org/base@v1",
        "org/lora@refs/pr/1",
    )
    assert split_reference("no/such/a+b") == ("no/such/a", "b")
    with open_source(str(base)) as source:
        assert source.folder == base
    with open_source(f"{base}+{adapter}") as source:
        assert str(adapter) in source.where(f"{QUERY}.weight")
        assert str(adapter) not in source.where(f"{QUERY}.bias")
        assert [one.file for one in source.digests()] == [
            "model.safetensors", "adapter_model.safetensors",
        ]  # fmt: skip


def test_a_sidecar_fits_the_merged_weights_it_was_estimated_on(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, data: Path
) -> None:
    base = make_model("base")
    tensors = pair(QUERY, 16, 16)
    first = write_adapter(tmp_path / "a", tensors)
    others = [
        write_adapter(tmp_path / "b", tensors, lora_alpha=7),
        write_adapter(tmp_path / "c", {name: 2 * one for name, one in tensors.items()}),
    ]
    command = ("estimate-fisher", base, "--data", data, "--adapter", first, "--out", "f")
    assert cli(*command).code == 0
    sidecar, header = open_sidecar(tmp_path / "f")
    sidecar.close()
    with open_source(f"{base}+{first}") as source:
        assert source.fingerprint() == header.fingerprint
    for other in (str(base), *(f"{base}+{one}" for one in others)):
        with open_source(other) as source:
            assert source.fingerprint() != header.fingerprint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "bias": "all"}),
        ("bert", {"target_modules": ["word_embeddings", "value"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "use_rslora": True}),
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}),
    ],
)
def test_is_what_peft_merges(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=7, **config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    with open_source(f"{tmp_path / 'base'}+{tmp_path / 'lora'}") as source:
        for name in source:
            torch.testing.assert_close(rows_of(source, name), merged[name], rtol=1e-5, atol=1e-6)
