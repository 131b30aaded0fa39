"""What goes along with the weights, and which checkpoints can be combined."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fishertool.checkpoint.companions import (
    Companions,
    copy_companions,
    find_companions,
    write_config,
    write_json,
)
from fishertool.checkpoint.compare import (
    check_not_quantized,
    check_same_shape,
    check_same_tensors,
)
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError
from fishertool.hub import MODEL_FILES

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "./2_Dense/", "type": "sentence_transformers.models.Dense"},
]

COPIED = [
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE",
    "LICENSE.md", "NOTICE", "added_tokens.json", "additional_chat_templates/tools.jinja",
    "chat_template.jinja", "chat_template.json", "config_sentence_transformers.json",
    "generation_config.json", "merges.txt", "modules.json", "preprocessor_config.json",
    "processor_config.json", "qwen.tiktoken", "sentence_bert_config.json",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json", "vocab.txt",
    # of the tokenizers of Marian, FSMT, Luke, BARTpho, BERTweet, MyT5, Whisper, Mistral, ...
    "source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json",
    "entity_vocab.json", "dict.txt", "bpe.codes", "byte_maps.json", "emoji.json", "normalizer.json",
    "prophetnet.tokenizer", "tekken.json", "word_pronunciation.json", "word_shape.json",
]  # fmt: skip

LEFT_OUT = [
    "1_Pooling/pooling.py", "1_Pooling/pytorch_model.bin", "1_Pooling/deeper/config.json",
    "LICENSE.py", "README.md", "additional_chat_templates/run.py", "chat_template.py",
    "eval/config.json", "eval/tools.jinja", "flax_model.msgpack", "modeling_custom.py",
    "optimizer.pt", "pytorch_model.bin", "tokenizer.bin", "tokenizer.pkl", "tokenizer.py",
    "training_args.bin",
]  # fmt: skip

WEIGHTS_AND_CONFIG = ["config.json", "model.safetensors", "model.safetensors.index.json"]
HIDDEN = [".gitattributes", ".LICENSE", ".cache/tokenizer.json", "1_Pooling/.config.json"]


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"contents of {name}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with every kind of file beside it."""
    folder = fill(tmp_path / "model", COPIED + LEFT_OUT + WEIGHTS_AND_CONFIG + HIDDEN)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    return folder


def everything_in(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_what_a_loader_needs_goes_along_and_the_rest_is_listed(folder: Path) -> None:
    companions = find_companions(folder)
    assert sorted(companions.copied) == sorted(COPIED)
    assert sorted(companions.left_out) == sorted(LEFT_OUT)


@pytest.mark.parametrize("name", COPIED)
def test_what_goes_along_is_fetched_from_the_hub(name: str) -> None:
    assert any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def test_copies_are_whole_and_take_the_mode_of_the_umask(folder: Path, tmp_path: Path) -> None:
    for name in COPIED:
        (folder / name).chmod(0o600)
    out = tmp_path / "out"
    before = os.umask(0o027)
    try:
        copy_companions(folder, find_companions(folder), out)
    finally:
        os.umask(before)
    assert everything_in(out) == sorted(COPIED)
    for name in COPIED:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
        assert (out / name).stat().st_mode & 0o777 == 0o640
        assert not (out / name).is_symlink()
    assert (out / "1_Pooling").stat().st_mode & 0o777 == 0o750


def test_folders_go_along_only_when_modules_name_them(folder: Path) -> None:
    (folder / "modules.json").unlink()
    copied = find_companions(folder).copied
    assert "additional_chat_templates/tools.jinja" in copied
    assert not [name for name in copied if name.startswith(("1_Pooling", "2_Dense"))]


@pytest.mark.parametrize(
    "content",
    ["{", "5", "null", '["1_Pooling"]', '{"path": "a"}', '[{"idx": 1}]', "\udcff", "[" * 100_000],
)
def test_modules_that_are_none_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"modules\.json: not") as caught:
        find_companions(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'modules.json'}: ")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("path", ["../outside", "ABSOLUTE", "1_Pooling/../../outside", "..", "/"])
def test_modules_outside_the_folder_are_not_copied(path: str, tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", ["config.json"])
    folder = fill(tmp_path / "model", ["1_Pooling/config.json", "LICENSE"])
    path = str(outside) if path == "ABSOLUTE" else path
    (folder / "modules.json").write_text(json.dumps([{"path": path}]))
    companions = find_companions(folder)
    assert sorted(companions.copied) == ["LICENSE", "modules.json"]
    copy_companions(folder, companions, tmp_path / "out" / "model")
    assert everything_in(tmp_path / "out") == ["model/LICENSE", "model/modules.json"]


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
)
def test_file_that_links_out_of_the_folder_is_refused(
    name: str, folder: Path, tmp_path: Path
) -> None:
    (folder / name).unlink()
    (tmp_path / "secret").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="links out of its folder; copy the file") as caught:
        find_companions(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_folder_that_links_elsewhere_is_not_entered(folder: Path, tmp_path: Path) -> None:
    (folder / "1_Pooling").rename(tmp_path / "elsewhere")
    (folder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    assert not [name for name in find_companions(folder).copied if "1_Pooling" in name]


def test_file_linked_within_the_folder_is_copied_as_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("LICENSE.md")
    copy_companions(folder, find_companions(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "contents of LICENSE.md"


def test_snapshot_of_the_hub_cache_is_copied_as_files(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--x" / "snapshots" / "rev"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(COPIED):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    companions = find_companions(snapshot)
    assert companions == Companions(companions.copied, ())
    copy_companions(snapshot, companions, tmp_path / "out")
    assert everything_in(tmp_path / "out") == sorted(COPIED)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


@pytest.mark.parametrize(
    "text",
    [
        '{"dtype":"bfloat16",  "a": 1}',
        '{"torch_dtype": "bfloat16"}\n\n',
        '{"model_type": "bert", "unit": "\\u00b5"}',
        '{"dtype": null}',
    ],
)
def test_config_that_stays_true_is_copied_byte_for_byte(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "config.json").write_text(text)
    write_config(tmp_path, out, "bfloat16")
    assert (out / "config.json").read_text() == text


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_states_the_dtype_written(key: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    config = {
        "model_type": "bert",
        key: "float32",
        "label": "µ",
        "half": "\ud800",
        "nested": {"b": [1], "a": None},
    }
    write_json(tmp_path / "config.json", config)
    write_config(tmp_path, out, "bfloat16")
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config[key]
    assert written == config | {"dtype": "bfloat16"}
    assert [name for name in written if name != "dtype"] == list(config)


def test_config_that_links_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", [])
    folder.mkdir()
    (tmp_path / "secret").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"config\.json: links out of its folder"):
        write_config(folder, tmp_path, "float32")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def checkpoint(
    opened: ExitStack, folder: Path, tensors: dict[str, Tensor], **config: Any
) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return opened.enter_context(open_checkpoint(folder))


STATE = {"body": torch.ones(2, 3), "head": torch.ones(3)}
SAME = "merge models of one architecture, or with --head keep-first if only their heads differ"


def compare(opened: ExitStack, tmp_path: Path, second: dict[str, Tensor], *apart: str) -> None:
    models = [
        checkpoint(opened, tmp_path / "one", STATE),
        checkpoint(opened, tmp_path / "same", STATE),
        checkpoint(opened, tmp_path / "two", second),
    ]
    check_same_tensors(models, apart, [list(model) for model in models])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"body": STATE["body"]}, "{two}: lacks head, which {one} has; "),
        (STATE | {"more": torch.ones(1)}, "{one}: lacks more, which {two} has; "),
        (
            STATE | {"head": torch.ones(4)},
            "{two}/model.safetensors: tensor head is F32 [4], but F32 [3] in {one}; ",
        ),
        (
            STATE | {"head": torch.ones(3, 1)},
            "{two}/model.safetensors: tensor head is F32 [3, 1], but F32 [3] in {one}; ",
        ),
        (
            STATE | {"head": torch.ones(3, dtype=torch.int64)},
            "{two}/model.safetensors: tensor head is I64 [3], but F32 [3] in {one}; ",
        ),
    ],
)
def test_mismatch_is_refused_unless_the_tensor_is_apart(
    second: dict[str, Tensor], message: str, tmp_path: Path, opened: ExitStack
) -> None:
    with pytest.raises(InputError) as caught:
        compare(opened, tmp_path, second)
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    assert str(caught.value) == message.format(**folders) + SAME
    assert caught.value.exit_code == 3
    compare(opened, tmp_path, second, "head", "more")


def test_other_precision_and_order_are_no_mismatch(tmp_path: Path, opened: ExitStack) -> None:
    compare(opened, tmp_path, {"head": torch.ones(3).half(), "body": torch.ones(2, 3).bfloat16()})


def test_many_missing_tensors_are_counted(tmp_path: Path, opened: ExitStack) -> None:
    first = checkpoint(opened, tmp_path / "one", {f"w{n}": torch.ones(1) for n in range(9)})
    second = checkpoint(opened, tmp_path / "two", {"w8": torch.ones(1)})
    with pytest.raises(InputError, match="lacks w0, w1, w2 and 5 more, which"):
        check_same_tensors([first, second], (), [list(first), list(second)])
    check_same_shape(first, second, "w8")


@pytest.mark.parametrize(
    ("quantization", "method"),
    [({"quant_method": "gptq"}, "gptq"), ({"bits": 4}, "unknown"), ("int8", "")],
)
def test_quantized_weights_are_refused(
    quantization: object, method: str, tmp_path: Path, opened: ExitStack
) -> None:
    model = checkpoint(opened, tmp_path / "model", STATE, quantization_config=quantization)
    with pytest.raises(InputError) as caught:
        check_not_quantized(model)
    assert str(caught.value).startswith(
        f"{model.folder}: quantized ({method}); dequantize it first"
    )


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_weights_that_are_not_quantized_pass(
    config: dict[str, Any], tmp_path: Path, opened: ExitStack
) -> None:
    check_not_quantized(checkpoint(opened, tmp_path / "model", STATE, **config))
