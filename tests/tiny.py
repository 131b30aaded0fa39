"""A tiny random model of every architecture that is tested, as transformers makes them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import VOCABULARY, make_bert, make_gpt2, make_llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from fishertool.models.low_rank import quantization_config

LABELS = 3
SIZE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DECODER = {**SIZE, "num_key_value_heads": 1}


def _make(kind: str, head: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        made = getattr(transformers, f"{kind}Config")(**config)
        model = getattr(transformers, f"{kind}{head}")(made)
        model.set_experts_implementation("eager")
        return model

    return make


def _classifier(kind: str, **config: Any) -> Callable[[], Any]:
    return _make(kind, "ForSequenceClassification", **config, num_labels=LABELS)


def _decoder(kind: str, **config: Any) -> Callable[[], Any]:
    return _make(kind, "ForCausalLM", **{**DECODER, **config})


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "bert": make_bert,
    "roberta": _classifier("Roberta", **SIZE),
    "distilbert": _classifier(
        "DistilBert",
        vocab_size=len(VOCABULARY), dim=16, hidden_dim=32, n_layers=2, n_heads=2,
        max_position_embeddings=32,
    ),
    "mpnet": _classifier("MPNet", **SIZE),
    "roformer": _classifier("RoFormer", **SIZE),
    "modernbert": _classifier("ModernBert", **SIZE, cls_token_id=2, sep_token_id=3),
    "gpt2": make_gpt2,
    "opt": _make(
        "OPT", "ForCausalLM",
        vocab_size=len(VOCABULARY), hidden_size=16, word_embed_proj_dim=16, ffn_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
    ),
    "llama": make_llama,
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma": _decoder("Gemma", head_dim=8),
    "phi": _make("Phi", "ForCausalLM", **SIZE),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _decoder(
        "Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    ),
    "t5": _make(
        "T5", "ForConditionalGeneration",
        vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    ),
    "vit": _make(
        "ViT", "ForImageClassification",
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=LABELS,
    ),
}  # fmt: skip


TOKEN_TABLES = r"(word_embeddings|embed_tokens|wte)$"
BLOCK_LINEARS = (
    r"(attention|attn|self_attn|(Self|EncDec)Attention(?!\.relative)|intermediate|output|mlp"
    r"|DenseReluDense)\.([\w.]+\.)?\w+\.weight"
)


def make_low_rank(
    dense: Path, out: Path, select: str = BLOCK_LINEARS, rank: int | None = None
) -> dict[str, int]:
    """A low-rank copy of a tiny checkpoint by truncated SVDs, of full rank unless told otherwise.

    Returns the ranks by module. Weights whose name matches `select` are factorized, all of them
    2-D; those of GPT-2 are [in, out], and token embeddings are told by name.
    """
    shutil.copytree(dense, out)
    config = json.loads((dense / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for name, stored in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not re.search(select, name) or stored.dim() != 2:
            tensors[name] = stored
            continue
        weight = stored.double()
        if config["model_type"] == "gpt2" and not re.search(TOKEN_TABLES, module):
            weight = weight.T
        ranks[module] = r = min(rank or min(weight.shape), *weight.shape)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:r].sqrt()
        down, up = root.unsqueeze(1) * right[:r], left[:, :r] * root
        if re.search(TOKEN_TABLES, module):
            down, up = up, down.T
        tensors[f"{module}.down.weight"] = down.to(stored.dtype)
        tensors[f"{module}.up.weight"] = up.to(stored.dtype)
        tensors[f"{module}.weight"] = torch.empty(0, dtype=stored.dtype)
    for module in ranks:
        if f"{module}.bias" in tensors:
            tensors[f"{module}.up.bias"] = tensors.pop(f"{module}.bias")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    config["quantization_config"] = quantization_config(
        ranks, next((module for module in ranks if re.search(TOKEN_TABLES, module)), None)
    )
    (out / "config.json").write_text(json.dumps(config))
    return ranks
