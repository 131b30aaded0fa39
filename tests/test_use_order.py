"""What a model uses before and after its layers, whatever the order in which it registers it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY
from tiny import ARCHITECTURES, SIZE

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.models.layer_stacks import names_after_layers
from fishertool.models.use_order import order_of_use

OPT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "d_model": 16, "max_position_embeddings": 32,
    **{f"{side}_{key}": value for side in ("encoder", "decoder")
       for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))},
}  # fmt: skip
MODELS = {
    "OPTForCausalLM": transformers.OPTConfig(**OPT, word_embed_proj_dim=8),
    "BartForSequenceClassification": transformers.BartConfig(**BART),
    "MPNetForMaskedLM": transformers.MPNetConfig(**SIZE),
    "MixtralForCausalLM": ARCHITECTURES["mixtral"]().config,
}
CASES = [
    (
        "OPTForCausalLM",
        "model.decoder.layers.",
        ["embed_tokens.weight", "embed_positions.weight", "project_in.weight"],
        ["final_layer_norm.weight", "final_layer_norm.bias", "project_out.weight"],
    ),
    (
        "BartForSequenceClassification",
        "model.encoder.layers.",
        ["embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias"],
        [],
    ),
    (
        "BartForSequenceClassification",
        "model.decoder.layers.",
        ["embed_positions.weight", "layernorm_embedding.weight"],
        # The forward pass on the meta device ends before the head, which is registered last.
        ["classification_head.out_proj.weight"],
    ),
    (
        "MPNetForMaskedLM",
        "mpnet.encoder.layer.",
        ["relative_attention_bias.weight", "mpnet.embeddings.LayerNorm.weight"],
        ["lm_head.dense.weight"],
    ),
    (
        "MixtralForCausalLM",
        "model.layers.",
        ["model.embed_tokens.weight"],
        ["model.norm.weight", "lm_head.weight"],
    ),
]


def found_after(folder: Path, stack: str) -> tuple[list[str], list[str]]:
    """All names outside of stacks of layers, and those after this one."""
    with open_checkpoint(folder) as checkpoint:
        outside = [
            name for name in checkpoint if not any(part.isdigit() for part in name.split("."))
        ]
        return outside, names_after_layers(checkpoint, stack, outside)


@pytest.mark.parametrize(("architecture", "stack", "before", "after"), CASES)
def test_before_and_after_go_by_use(
    tmp_path: Path, architecture: str, stack: str, before: list[str], after: list[str]
) -> None:
    model = getattr(transformers, architecture)(MODELS[architecture])
    model.save_pretrained(tmp_path)
    outside, found = found_after(tmp_path, stack)
    side = f"{stack.rsplit('.', 2)[0]}."
    for names, wanted in ((before, False), (after, True)):
        for name in names:
            own = name if name in outside else f"{side}{name}"
            assert own in outside and (own in found) is wanted, own


def test_a_base_models_names_are_those_of_its_own_file(tmp_path: Path) -> None:
    transformers.OPTModel(MODELS["OPTForCausalLM"]).save_pretrained(tmp_path)
    outside, found = found_after(tmp_path, "decoder.layers.")
    assert {name for name in outside if name not in found} == {
        "decoder.embed_tokens.weight", "decoder.embed_positions.weight", "decoder.project_in.weight",
    }  # fmt: skip


def test_without_a_forward_pass_the_order_is_that_of_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("wants an image")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", refuse)
    ARCHITECTURES["llama"]().save_pretrained(tmp_path)
    outside, found = found_after(tmp_path, "model.layers.")
    assert sorted(outside) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert sorted(found) == ["lm_head.weight", "model.norm.weight"]


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "vit"])
def test_every_parameter_is_seen_in_a_forward_pass(kind: str) -> None:
    made = ARCHITECTURES[kind]()
    with torch.device("meta"):
        model = type(made)(made.config)
    seen = order_of_use(model)
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
    assert "embed" in seen[0] or seen[0] in ("transformer.wte.weight", "shared.weight")
