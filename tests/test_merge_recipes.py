"""`fishertool merge --config RECIPE`: slices, gradients, filters, against tensors put together."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, weights_of

from fishertool.checkpoint.source import TensorSource
from fishertool.surgery import merge_layers
from fishertool.surgery.merge_layers import config_of_layers, layer_of, own_names


def layer(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """A layer's tensors by what they are called in it."""
    prefixes = {found[0] for found in map(layer_of, tensors) if found}
    [stack] = prefixes
    start = f"{stack}{number}."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def recipe(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def llamas(make_model: ModelMaker) -> tuple[Path, Path]:
    return make_model("a", "llama", 1), make_model("b", "llama", 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_put_on_top_of_each_other_load_and_are_those_of_the_recipe(
    cli: Cli, make_model: ModelMaker, kind: str, tmp_path: Path
) -> None:
    a, b = make_model("a", kind, 1), make_model("b", kind, 2)
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {a}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [1, 2]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [0, 2]}}]\n",
    )
    result = cli("merge", "--config", file, "--out", "o", "--json")
    assert result.code == 0, result.err
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    for number, (source, theirs) in enumerate(
        [(first, 0), (first, 1), (second, 1), (second, 0), (second, 1)]
    ):
        ours, wanted = layer(merged, number), layer(source, theirs)
        assert set(ours) == set(wanted) and ours
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    before = "model.embed_tokens.weight" if kind == "llama" else "transformer.wte.weight"
    after = "model.norm.weight" if kind == "llama" else "transformer.ln_f.weight"
    assert torch.equal(merged[before], first[before])
    assert torch.equal(merged[after], second[after])
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "o", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == 5


@pytest.mark.parametrize(("layers", "code"), [("[0, 2]", 3), ("[1, 3]", 0)])
def test_an_order_of_layers_that_the_config_cannot_describe_is_refused(
    cli: Cli, tmp_path: Path, layers: str, code: int
) -> None:
    """Of a mixture whose first layer is dense: by number, in its config."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        size = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
        config = transformers.Qwen3MoeConfig(
            **size, **heads, **experts, vocab_size=32, num_hidden_layers=3
        )
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {a}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {b}, layer_range: {layers}}}]\n",
    )
    result = cli("merge", "--config", file, "--out", "o")
    assert result.code == code, result.err
    assert ("cannot describe layers in this order: they lack" in result.err) == (code == 3)
    assert (tmp_path / "o").exists() == (code == 0)


def test_what_comes_after_the_layers_must_be_there_in_the_last_slice(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    make_model("a", "llama", 1), make_model("b", "llama", 2, tied=True)
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n- sources: [{model: b, layer_range: [0, 2]}]\n",
    )
    result = cli("merge", "--config", file, "--out", "o", "--dry-run")
    assert (result.code, result.out) == (3, ""), result.err
    assert "b: lacks lm_head.weight, which a has; let the first and the last slice" in result.err


@pytest.mark.parametrize(
    ("method", "slices", "head", "code"),
    [
        ("passthrough", ["b", "a"], "", 3),
        ("passthrough", ["b", "a", "b"], "", 0),
        ("passthrough", ["b", "a"], "head: keep-first\n", 0),
        ("linear", ["b a"], "", 3),
    ],
)
def test_nothing_of_an_end_is_left_out_silently(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, method: str, slices: list[str], head: str,
    code: int,
) -> None:  # fmt: skip
    """The first is tied and has no output layer; the other's would be lost."""
    make_model("a", "llama", 1), make_model("b", "llama", 2, tied=True)
    lines = [
        f"- sources: [{', '.join(f'{{model: {name}, layer_range: [0, 2]}}' for name in one.split())}]\n"
        for one in slices
    ]
    file = recipe(tmp_path / "r.yml", f"merge_method: {method}\n{head}slices:\n{''.join(lines)}")
    result = cli("merge", "--config", file, "--out", "o", "--dry-run")
    assert result.code == code, result.err
    assert ("b: lacks lm_head.weight, which" in result.err) == (code == 3)


def test_layers_of_another_size_are_refused_by_their_shape(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    make_model("a", "llama", 1)
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"intermediate_size": 24}
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    wider.save_pretrained(tmp_path / "b")
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n- sources: [{model: b, layer_range: [0, 2]}]\n",
    )
    result = cli("merge", "--config", file, "--out", "o", "--dry-run")
    assert result.code == 3, result.err
    assert (
        "makes model.layers.2.mlp.gate_proj.weight [32, 16], but it would be [24, 16]" in result.err
    )


def test_a_slice_merges_layers_of_different_numbers(
    cli: Cli, llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = llamas
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: linear\nslices:\n- sources:\n"
        f"  - {{model: {a}, layer_range: [0, 1], parameters: {{weight: 0.25}}}}\n"
        f"  - {{model: {b}, layer_range: [1, 2], parameters: {{weight: 0.75}}}}\n",
    )
    assert cli("merge", "--config", file, "--out", "o", "-q").code == 0
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    ours = layer(merged, 0)
    for name, value in layer(first, 0).items():
        torch.testing.assert_close(ours[name], 0.25 * value + 0.75 * layer(second, 1)[name])
    assert not layer(merged, 1)


def test_models_of_many_slices_are_looked_through_once(
    cli: Cli, llamas: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def counted(source: TensorSource) -> list[str]:
        seen.append(source.folder.name)
        return own_names(source)

    monkeypatch.setattr(merge_layers, "own_names", counted)
    pieces = "".join(
        f"- sources: [{{model: {name}, layer_range: [{layer}, {layer + 1}]}}]\n"
        for name in "abab"
        for layer in range(2)
    )
    file = recipe(tmp_path / "r.yml", f"merge_method: passthrough\nslices:\n{pieces}")
    assert cli("merge", "--config", file, "--out", "o", "--dry-run", "-q").code == 0
    assert seen == ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [("[1, 0]", (1.0, 0.0)), ("[0.2, 0.4, 0.8]", (0.2, 0.8))],
)
def test_gradients_run_over_the_layers(
    cli: Cli, llamas: tuple[Path, Path], weights: str, wanted: tuple[float, float], tmp_path: Path
) -> None:
    a, b = llamas
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        f"- {{model: {a}, parameters: {{weight: {weights}}}}}\n"
        f"- {{model: {b}, parameters: {{weight: 1}}}}\n",
    )
    assert cli("merge", "--config", file, "--out", "o", "-q").code == 0
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    for number in range(2):
        for name, value in layer(merged, number).items():
            expected = wanted[number] * layer(first, number)[name] + layer(second, number)[name]
            torch.testing.assert_close(value, expected)


AFTER = {
    "llama": ["model.norm.weight", "lm_head.weight"],
    "bert": ["bert.pooler.dense.bias", "classifier.weight"],
    "gpt2": ["transformer.ln_f.bias"],
    "t5": ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"],
}
BEFORE = {
    "llama": ["model.embed_tokens.weight"],
    "bert": ["bert.embeddings.LayerNorm.weight", "bert.embeddings.word_embeddings.weight"],
    "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
    "t5": ["shared.weight"],
}


@pytest.mark.parametrize("kind", AFTER)
def test_what_comes_after_the_layers_has_a_gradients_last_value(
    cli: Cli, make_model: ModelMaker, kind: str, tmp_path: Path
) -> None:
    a, b = make_model("a", kind, 1, spread=0.1), make_model("b", kind, 2, spread=0.1)
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: linear\nmodels:\n"
        f"- {{model: {a}, parameters: {{weight: [1, 0]}}}}\n"
        f"- {{model: {b}, parameters: {{weight: [0, 1]}}}}\n",
    )
    result = cli("merge", "--config", file, "--out", "o", "-q")
    assert (result.code, result.err) == (0, "")
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    for names, wanted in ((BEFORE[kind], first), (AFTER[kind], second)):
        assert all(torch.equal(merged[name], wanted[name]) for name in names)


def test_slices_have_a_gradients_ends_before_and_after_their_layers(
    cli: Cli, llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = llamas
    weights = "parameters: {weight: [1, 0]}", "parameters: {weight: [0, 1]}"
    pieces = "".join(
        f"- sources:\n  - {{model: {a}, layer_range: {layers}, {weights[0]}}}\n"
        f"  - {{model: {b}, layer_range: {layers}, {weights[1]}}}\n"
        for layers in ("[0, 2]", "[0, 2]")
    )
    file = recipe(tmp_path / "r.yml", f"merge_method: linear\nslices:\n{pieces}")
    assert cli("merge", "--config", file, "--out", "o", "-q").code == 0
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    assert torch.equal(merged["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], second["lm_head.weight"])


@pytest.mark.parametrize(("weight", "told"), [("[1, 0]", True), ("0.5", False)])
def test_gradients_of_an_unknown_architecture_are_told_of(
    cli: Cli, llamas: tuple[Path, Path], weight: str, told: bool, tmp_path: Path
) -> None:
    for folder in llamas:
        config = folder / "config.json"
        config.write_text(config.read_text().replace("LlamaForCausalLM", "OwnForCausalLM"))
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        f"- {{model: a, parameters: {{weight: {weight}}}}}\n"
        f"- {{model: b, parameters: {{weight: 1}}}}\n",
    )
    result = cli("merge", "--config", file, "--out", "o", "--json")
    assert result.code == 0, result.err
    wanted = ["a: its architecture does not tell what comes after its layers: gradients give all "
              "tensors outside of them their first value"]  # fmt: skip
    assert result.report["warnings"] == (wanted if told else [])


def test_the_first_rule_that_matches_wins(
    cli: Cli, llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = llamas
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: slerp\n"
        f"base_model: {a}\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"
        "parameters:\n  t:\n  - {filter: self_attn, value: 0}\n"
        "  - {glob: '*.mlp.*', value: 1}\n  - value: 0.5\n",
    )
    assert cli("merge", "--config", file, "--out", "o", "-q").code == 0
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    for name, value in merged.items():
        if "self_attn" in name:
            torch.testing.assert_close(value, first[name])
        elif "mlp" in name:
            torch.testing.assert_close(value, second[name])
    embedding = "model.embed_tokens.weight"
    assert not torch.allclose(merged[embedding], first[embedding])


def test_the_output_has_the_dtype_of_the_recipe(
    cli: Cli, llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = llamas
    file = recipe(
        tmp_path / "r.yml",
        f"merge_method: linear\ndtype: float32\nout_dtype: bfloat16\nmodels:\n"
        f"- {{model: {a}, parameters: {{weight: 3}}}}\n- {{model: {b}, parameters: {{weight: 1}}}}\n",
    )
    report = cli("merge", "--config", file, "--out", "o", "--json").report
    assert report["output"]["dtype"] == "bfloat16"
    first, second = weights_of(a), weights_of(b)
    for name, value in weights_of(tmp_path / "o").items():
        exact = 0.75 * first[name].double() + 0.25 * second[name].double()
        assert torch.equal(value, exact.to(torch.bfloat16))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert model.dtype == torch.bfloat16


MODELS = "models: [{model: A}, {model: B}]\n"
BAD: dict[str, tuple[str, int, str]] = {
    "typo": ("merge_method: linear\nmodles: []\n", 2, "did you mean 'models'"),
    "unknown method": (f"merge_method: linaer\n{MODELS}", 2, "did you mean 'linear'"),
    "unknown setting": (
        f"merge_method: linear\n{MODELS}parameters: {{normalise: true}}\n",
        2,
        "did you mean 'normalize'",
    ),
    "rule without effect": (
        f"merge_method: slerp\nbase_model: A\n{MODELS}"
        "parameters: {t: [{filter: selfattn, value: 0}, {value: 1}]}\n",
        2,
        "'selfattn' decides none of 21 tensors",
    ),
    "no base": (f"merge_method: ties\n{MODELS}", 2, "needs --base"),
    "the base alone": (
        "merge_method: task_arithmetic\nbase_model: A\nmodels: [{model: A}]\n",
        2,
        "merges one or more models; 0 given beside the base; to write out the base alone: passthrough",
    ),
    "three models": (
        "merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}, {model: C}]\n"
        "parameters: {t: 0.5}\n",
        2,
        "3",
    ),
    "density": (
        f"merge_method: ties\nbase_model: C\n{MODELS}parameters: {{density: 1.5}}\n",
        2,
        "density",
    ),
    "layers it has not": (
        "merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [0, 7]}]}]\n",
        2,
        "layers 0 to 7",
    ),
    "runs of other lengths": (
        "merge_method: linear\nslices:\n"
        "- sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 1]}]\n",
        2,
        "1 and 2 layers",
    ),
    "missing model": (
        "merge_method: linear\nmodels: [{model: A}, {model: ./nowhere}]\n", 3, "nowhere",
    ),
    "a seed of nothing": (
        "merge_method: linear\nmodels: [{model: A}, {model: B}]\nseed: 0\n", 2,
        "seed: method linear draws nothing",
    ),
    "weights that sum to zero": (
        "merge_method: linear\nmodels:\n- {model: A, parameters: {weight: 1}}\n"
        "- {model: B, parameters: {weight: -1}}\n",
        2,
        "method linear: weights that sum to 0 cannot be normalized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_line_before_any_work(
    cli: Cli, make_model: ModelMaker, case: str, tmp_path: Path
) -> None:
    text, code, words = BAD[case]
    for seed, name in enumerate("ABC"):
        make_model(name, "llama", seed)
    file = recipe(tmp_path / "r.yml", text)
    result = cli("merge", "--config", file, "--out", "o")
    assert (result.code, result.out) == (code, ""), result.err
    assert words in result.err and len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_recipe_printed_is_a_recipe_that_gives_the_same(
    cli: Cli, llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("merge", *llamas, "--weights", "0.3,0.7", "--exclude", "lm_head.*")
    printed = cli(*flags, "--print-config")
    assert printed.code == 0 and not (tmp_path / "o").exists()
    file = recipe(tmp_path / "r.yml", printed.out)
    assert cli(*flags, "--out", "o", "-q").code == 0
    assert cli("merge", "--config", file, "--out", "p", "-q").code == 0
    ours, again = weights_of(tmp_path / "o"), weights_of(tmp_path / "p")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    both = cli("merge", *llamas, "--config", file, "--out", "q")
    assert (both.code, "the recipe" in both.err) == (2, True)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--trim", 0.5), ("--anchor", 0.5), ("--power", 1), ("--method", "ties"), ("--base", "a"),
     ("--set", "normalize=true"), ("--preset", "matena"), ("--fisher", "f"), ("--head", "merge"),
     ("--tokenizer", "union"), ("--include", "*"), ("--exclude", "x")],
)  # fmt: skip
def test_a_flag_that_says_what_the_recipe_says_is_refused(
    cli: Cli, llamas: tuple[Path, Path], flag: str, value: object, tmp_path: Path
) -> None:
    file = recipe(tmp_path / "r.yml", "merge_method: linear\nmodels: [{model: a}, {model: b}]")
    result = cli("merge", "--config", file, flag, value, "--out", "o")
    assert (result.code, f"{flag}: the recipe" in result.err) == (2, True), result.err


def test_weights_given_beside_a_recipe_are_printed_and_replace_all_of_its_own(
    cli: Cli, llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    file = recipe(
        tmp_path / "r.yml",
        "merge_method: linear\nparameters: {weight: [{filter: mlp, value: 1}, {value: 2}]}\n"
        "models: [{model: a, parameters: {weight: 0.5}}, {model: b}]",
    )
    flags = ("merge", "--config", file, "--weights", "0.9,0.1")
    printed = recipe(tmp_path / "p.yml", cli(*flags, "--print-config").out)
    assert cli(*flags, "--out", "o", "-q").code == 0
    assert cli("merge", "--config", printed, "--out", "p", "-q").code == 0
    first, second, again = *map(weights_of, llamas), weights_of(tmp_path / "p")
    for name, value in weights_of(tmp_path / "o").items():
        torch.testing.assert_close(value, 0.9 * first[name] + 0.1 * second[name])
        assert torch.equal(value, again[name])


@pytest.mark.parametrize(
    "flags",
    [("--weights", "optimal"), ("--weights", "optimal-free"), ("--as-lora", "3"),
     ("--search-weights", "grid")],
)  # fmt: skip
def test_what_a_recipe_cannot_say_is_not_printed_as_one(cli: Cli, flags: tuple[str, ...]) -> None:
    result = cli("merge", "a", "b", *flags, "--print-config")
    assert (result.code, result.out) == (2, "")
    assert flags[0] in result.err and "a recipe cannot say it" in result.err


def test_weights_are_counted_in_every_slice(
    cli: Cli, llamas: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    source = "{{model: {}, layer_range: [{}, {}]}}"
    low, high = (
        ", ".join(source.format(name, first, first + 1) for name in names)
        for names, first in (("ab", 0), ("aba", 1))
    )
    file = recipe(
        tmp_path / "r.yml",
        f"merge_method: linear\nslices: [{{sources: [{low}]}}, {{sources: [{high}]}}]",
    )
    for flags, told in (
        (("--weights", ".4,.6"), "--weights has 2 numbers for 3 models in slices[1]"),
        (("--search-weights", "grid", "--evaluate-on", data), "as many models in every slice"),
    ):
        result = cli("merge", "--config", file, *flags, "--out", "o")
        assert (result.code, told in result.err) == (2, True), result.err
    assert cli("merge", "--config", file, "--out", "o", "-q").code == 0


@pytest.mark.parametrize(
    "text",
    ["merge_method: linear\nmodels: [{model: a}, {model: b}]", "models: [a, b]\nmethod: linear"],
)
def test_a_recipe_or_flags_may_come_through_a_pipe(
    llamas: tuple[Path, Path], text: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "fishertool", "merge", "--config", "/dev/stdin", "--out", "o"]
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "o").is_dir()) == (0, True), done.stderr


def test_a_config_says_how_deep_the_model_is() -> None:
    config: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["x", "y"], "hidden_size": 2}
    changed = config_of_layers(config, 2, [1, 1, 0])
    assert changed == {"num_hidden_layers": 3, "layer_types": ["y", "y", "x"]}


@pytest.mark.parametrize("threads", [1, 2])
def test_random_methods_give_the_same_bytes_at_any_thread_count(
    cli: Cli, make_model: ModelMaker, threads: int, tmp_path: Path
) -> None:
    models = [make_model(name, "llama", seed) for seed, name in enumerate("abc")]
    flags = ("--method", "dare-ties", "--base", models[2], "--set", "density=0.5", "-q")
    for out, seed, count in (("o", 1, 1), ("p", 1, threads), ("q", 2, threads)):
        more = ("--seed", seed, "--threads", count, "--out", out)
        assert cli("merge", *models[:2], *flags, *more).code == 0
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in "opq"]
    assert files[0] == files[1] != files[2]


def test_the_seed_of_hashes_has_no_influence(make_model: ModelMaker, tmp_path: Path) -> None:
    models = [str(make_model(name, "llama", seed)) for seed, name in enumerate("abc")]
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "fishertool", "merge", *models[:2], "--base", models[2]]
        command += ["--method", "dare-ties", "--set", "density=0.5", "--out", str(out), "-q"]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
        files.append({p.name: p.read_bytes() for p in out.iterdir() if "report" not in p.name})
    assert files[0] == files[1]
