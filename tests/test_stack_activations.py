"""Second moments of the inputs of experts that are one stack on disk, and what is done with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, Estimate, make_tokenizer
from test_factorize_selection import save_stacks
from test_prune_command import weights_of
from test_prune_stacks import DOWN, GATE_UP, save_both
from torch import Tensor

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.factorization.svd import svd
from fishertool.fisher.function_calls import FunctionCalls
from fishertool.fisher.kronecker import InputMoments, mirrored
from fishertool.merging.regmean import regmean
from fishertool.sidecar import open_sidecar

EXPERTS = "model.layers.0.mlp.experts"


def moments_of(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(folder, "activation") as tensors:
        return {name.removesuffix("#input"): tensors[name] for name in tensors}


@pytest.mark.parametrize("batch", ["1", "3", "auto"])
def test_they_are_those_of_the_same_experts_apart(
    cli: Cli, data: Path, tmp_path: Path, batch: str
) -> None:
    found = []
    for model in save_both(tmp_path):
        flags = ("--data", data, "--kind", "activation", "--batch-size", batch, "-q")
        result = cli("estimate-fisher", model, *flags, "--out", f"{model}-f")
        assert result.code == 0, result.err
        found.append(moments_of(tmp_path / f"{model.name}-f"))
    apart, stacked = found
    assert stacked[GATE_UP].shape == (16, 16, 16) and stacked[DOWN].shape == (16, 12, 12)
    for expert in range(16):
        for stack, name in ((DOWN, "down_proj"), (GATE_UP, "gate_proj")):
            wanted = apart.get(f"{EXPERTS}.{expert}.{name}.weight")
            if wanted is None:  # no token went there
                assert not stacked[stack][expert].any()
            else:
                torch.testing.assert_close(stacked[stack][expert], wanted, rtol=1e-5, atol=1e-7)


def test_those_of_a_turned_stack(estimated: Estimate, data: Path, tmp_path: Path) -> None:
    """By the definition: every token that the router sends to an expert, in float64."""
    model = save_stacks(tmp_path / "m")
    with open_checkpoint(fisher := estimated(model, "activation"), "activation") as tensors:
        found = tensors[f"{GATE_UP}#input"]
    tensors, header = open_sidecar(fisher, "activation")
    tensors.close()
    assert {GATE_UP, DOWN} <= set(header.transposed)
    made: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    )
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    totals, counts = torch.zeros(4, 16, 16, dtype=torch.float64), torch.zeros(4)

    def see(module: Any, args: Any, kwargs: Any) -> None:
        hidden, chosen = list[Any]([*args, *kwargs.values()])[:2]
        for row, experts in zip(hidden.reshape(-1, 16), chosen, strict=True):
            for expert in experts:
                totals[expert] += row.outer(row)
                counts[expert] += 1

    made.model.layers[0].mlp.experts.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for line in data.read_text().splitlines():
            made(**tokenizer(json.loads(line)["text"], return_tensors="pt"))
    wanted = totals / counts.clamp(min=1)[:, None, None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_experts_that_are_given_all_tokens_once_each(cli: Cli, data: Path, tmp_path: Path) -> None:
    """Llama 4's: one after another's, so that their rows are no example's. What comes after them is
    the same in batches."""
    config = transformers.Llama4TextConfig(
        vocab_size=23, hidden_size=16, intermediate_size=12, intermediate_size_mlp=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_local_experts=3, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "m")
    make_tokenizer(template=False).save_pretrained(tmp_path / "m")
    found = []
    for batch in (1, 3):
        flags = ("--data", data, "--kind", "activation", "--batch-size", batch, "-q")
        assert cli("estimate-fisher", "m", *flags, "--out", f"f{batch}").code == 0
        found.append(moments_of(tmp_path / f"f{batch}"))
    assert found[0].keys() == found[1].keys()
    for name, moment in found[0].items():
        torch.testing.assert_close(found[1][name], moment, rtol=1e-4, atol=1e-6)


def test_a_stack_that_is_mirrored_on_disk_has_the_same(tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        save_stacks(tmp_path / "m"), experts_implementation="eager"
    )
    ids = torch.tensor([[4, 9, 7, 5], [8, 6, 5, 11]])
    sums, transposed = [], []
    down = model.get_parameter(DOWN)
    for tensor in (down, down.mT):
        moments = InputMoments({DOWN: tensor}, stacks=True)
        calls = FunctionCalls(model, {DOWN: tensor})
        with calls, moments.watching(calls), torch.no_grad():
            moments.begin([torch.ones_like(ids)])
            model(ids)
            moments.end()
        sums.append(moments.sums[DOWN])
        transposed.append(moments.transposed)
    assert sums[0].any() and torch.equal(*sums)
    assert transposed == [{DOWN}, set()]


def test_a_layer_that_is_met_again_leads_none(cli: Cli, tmp_path: Path) -> None:
    """DeBERTa's queries and keys are projected from relative positions too, its values are not."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, relative_attention=True,
        pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8, num_labels=3,
    )  # fmt: skip
    model: Any = transformers.DebertaV2ForSequenceClassification(config).eval()
    parameters = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    seen: dict[str, list[Tensor]] = {name: [] for name in parameters}
    moments = InputMoments(parameters)
    with FunctionCalls(model, parameters) as calls, moments.watching(calls), torch.no_grad():
        for name in parameters:
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.register_forward_hook(
                lambda _, args, __, name=name: seen[name].append(args[0].reshape(-1, 16).double())
            )
        for start in (4, 9):
            ids = torch.arange(start, start + 6)[None]
            moments.begin([torch.ones_like(ids)])
            model(ids)
            moments.end()
    for name, inputs in seen.items():
        rows = torch.cat(inputs)
        leader = moments.leader[name]
        assert moments.tokens[leader] == len(rows)
        torch.testing.assert_close(
            mirrored(moments.sums[leader], 1).double(), rows.T @ rows, rtol=1e-5, atol=1e-5
        )


def test_a_kronecker_fisher_keeps_none(cli: Cli, estimated: Estimate, tmp_path: Path) -> None:
    """It has no other half of them."""
    fisher = estimated(save_stacks(tmp_path / "m"), "kronecker")
    tensors, header = open_sidecar(fisher, "kronecker")
    with tensors:
        assert {DOWN, GATE_UP} <= set(header.without)
        assert not any(DOWN in name or GATE_UP in name for name in tensors)


def test_regmean_of_stacks_is_that_of_the_experts_apart(
    cli: Cli, estimated: Estimate, tmp_path: Path
) -> None:
    """An expert that the tokens of one model alone reach, with nothing but zeros of the other."""
    merged, folders = [], [save_both(tmp_path / f"seed{seed}", seed) for seed in (0, 1)]
    for models in zip(*folders, strict=True):
        fishers = [flag for one in models for flag in ("--fisher", estimated(one, "activation"))]
        out = tmp_path / f"merged-{models[0].name}"
        result = cli("merge", *models, "--method", "regmean", *fishers, "--out", out, "--json")
        assert result.code == 0, result.err
        merged.append(weights_of(out))
    rows = {row["name"]: row["action"] for row in result.report["tensors"]}
    assert rows[DOWN] == rows[GATE_UP] == "merge"
    before = [weights_of(stacked) for _, stacked in folders]
    moments = [moments_of(stacked.with_name("fisher-stacked")) for _, stacked in folders]
    both = 0
    for expert in range(16):
        inputs = [one[DOWN][expert] for one in moments]
        wanted = regmean([one[DOWN][expert] for one in before], [0.5, 0.5], inputs)
        torch.testing.assert_close(merged[1][DOWN][expert], wanted, rtol=1e-5, atol=1e-7)
        if all(bool(one.any()) for one in inputs):
            both += 1
            apart = merged[0][f"{EXPERTS}.{expert}.down_proj.weight"]
            torch.testing.assert_close(apart, wanted, rtol=1e-4, atol=1e-6)
    assert 0 < both < 16


@pytest.mark.parametrize(
    ("method", "kind"),
    [("whitened", "activation"), ("fwsvd", "diagonal"), ("kronecker", "kronecker")],
)
def test_factorize_of_stacks_is_that_of_the_experts_apart(
    cli: Cli, estimated: Estimate, tmp_path: Path, method: str, kind: str
) -> None:
    """And plain, of those that no token reached."""
    apart, stacked = save_both(tmp_path)
    models = [apart] if kind == "kronecker" else [apart, stacked]
    fishers = [estimated(model, kind) for model in models]
    tensors, _ = open_sidecar(fishers[0], kind)
    suffix = "" if kind == "diagonal" else "#input"
    names = [f"{EXPERTS}.{expert}.down_proj.weight" for expert in range(16)]
    with tensors:
        told = [name + suffix in tensors and bool(tensors[name + suffix].any()) for name in names]
    assert 0 < sum(told) < 16
    before, factorized = weights_of(apart), []
    for model, fisher in zip(models, fishers, strict=True):
        flags = ("--method", method, "--fisher", fisher, "--format", "dense", "--json")
        chosen = ("--rank", 4, "--include", "*.layers.0.*.down_proj*")
        result = cli("factorize", model, *flags, *chosen, "--out", f"{model}-out")
        assert result.code == 0, result.err
        [warning] = [one for one in result.report["warnings"] if "no token reached" in one]
        assert warning.startswith("no token reached") and "factorized as by svd" in warning
        factorized.append(weights_of(tmp_path / f"{model.name}-out"))
    for expert, name in enumerate(names):
        plain = torch.matmul(*svd(before[name]).truncate(4)).float()
        wanted = factorized[0][name] if told[expert] else plain
        for one in factorized:
            found = one[name] if name in one else one[DOWN][expert]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert told[expert] != torch.allclose(wanted, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("verb", "method", "kind"),
    [
        (("factorize", "--rank", 4, "--format", "dense"), "whitened", "activation"),
        (("factorize", "--rank", 4, "--format", "dense"), "fwsvd", "diagonal"),
        (("prune", "--sparsity", 0.5), "wanda", "activation"),
    ],
)
def test_an_expert_that_was_left_out_of_an_estimate_is_not_told_as_unreached(
    cli: Cli, data: Path, tmp_path: Path, verb: tuple[object, ...], method: str, kind: str
) -> None:
    model, _ = save_both(tmp_path)
    flags = ("--data", data, "--kind", kind, "--exclude", "*.experts.3.*", "--out", "f", "-q")
    assert cli("estimate-fisher", model, *flags).code == 0
    name, *rest = verb
    result = cli(name, model, *rest, "--method", method, "--fisher", "f", "--out", "o")
    assert result.code == 3
    assert f"has no {kind} statistic of {EXPERTS}.3." in result.err and "--exclude" in result.err


def test_what_no_token_reached_has_the_least_of_a_shared_budget(
    cli: Cli, estimated: Estimate, tmp_path: Path
) -> None:
    apart, _ = save_both(tmp_path)
    flags = ("--method", "whitened", "--fisher", estimated(apart, "activation"), "--json")
    more = ("--format", "dense", "--keep", 0.5, "--include", "*.down_proj*", "--out", "o")
    result = cli("factorize", apart, *flags, "--allocate", "global", *more)
    assert result.code == 0, result.err
    with open_checkpoint(tmp_path / "fisher-apart", "activation") as tensors:
        reached = {name.removesuffix("#input") for name in tensors}
    ranks = {row["name"]: row.get("rank", 99) for row in result.report["tensors"]}
    down = [name for name in ranks if "down_proj" in name]
    assert {ranks[name] for name in down if name not in reached} == {1}
    assert max(ranks[name] for name in down if name in reached) > 1


def test_a_plan_counts_their_bytes(cli: Cli, data: Path, tmp_path: Path) -> None:
    model = save_stacks(tmp_path / "m")
    flags = ("--data", data, "--kind", "activation", "--out", "f", "--json")
    for more, exactly in (("*.experts.*", True), ("*", False)):
        command = ("estimate-fisher", model, *flags, "--include", more, "--overwrite")
        told = cli(*command, "--dry-run").report["summary"]["bytes_by_kind"]["activation"]
        assert cli(*command).code == 0
        found = sum(4 * one.numel() for one in moments_of(tmp_path / "f").values())
        assert told == found if exactly else told >= found


def test_parts_add_up_to_the_same_bytes(cli: Cli, data: Path, tmp_path: Path) -> None:
    flags = ("estimate-fisher", save_stacks(tmp_path / "m"), "--data", data, "--kind", "activation")
    assert cli(*flags, "--out", "whole").code == 0
    for part in (1, 2):
        assert cli(*flags, "--part", f"{part}/2", "--out", f"p{part}").code == 0
    assert cli("combine-fisher", "p1", "p2", "--out", "f").code == 0
    names = [folder / "activation.safetensors" for folder in (tmp_path / "whole", tmp_path / "f")]
    assert names[0].read_bytes() == names[1].read_bytes()
