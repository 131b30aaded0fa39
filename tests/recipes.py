"""Recipes as people write them for mergekit, and methods to resolve them for."""

import inspect
from collections.abc import Sequence
from typing import Any

import yaml

from fishertool.recipe.schema import Recipe, parse_recipe
from fishertool.registry import Method

PerModel = float | Sequence[float]

SLERP = """
slices:
  - sources:
      - model: org/seven-b
        layer_range: [0, 32]
      - model: other/seven-b-chat   # the one to go to
        layer_range: [0, 32]
merge_method: slerp
base_model: other/seven-b-chat
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
"""
TIES = """
models:
  - model: org/base   # no parameters necessary for base model
  - model: org/math
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE_TIES = """
models:
  - model: org/base
  - model: org/a
    parameters: {density: 0.53, weight: 0.4}
  - model: org/b@v1.2
    parameters: {density: 0.53, weight: 0.3}
  - model: org/c+org/c-lora
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: org/base
parameters:
  int8_mask: true
  lambda: 1.1
dtype: float32
out_dtype: bfloat16
tokenizer_source: base
"""
FRANKENMERGE = """
dtype: float16
merge_method: passthrough
slices:
- sources:
  - model: org/seventy-b
    layer_range: [0, 16]
- sources:
  - model: org/other-seventy-b
    layer_range: [8, 24]
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: 0.0
        - value: 1.0
- sources: [{model: org/seventy-b, layer_range: [17, 32]}]
"""
LINEAR = """
models:
  - model: org/a
    parameters:
      weight: 1.0
  - model: org/b
    parameters:
      weight: 3e-1
  - model: {model: {path: org/c, revision: abc}, lora: org/c-lora}
    parameters:
      weight: 0.5
merge_method: linear
dtype: torch.float16
"""
MODEL_STOCK = """
models: [{model: org/base}, {model: org/a}, {model: org/b}, {model: org/c}]
base_model: org/base
merge_method: model_stock
parameters:
  filter_wise: false
"""
TASK_ARITHMETIC = """
base_model: org/base
models:
  - model: org/base
    parameters: {weight: 0.2}
  - model: org/a
    parameters: {weight: 0.6}
  - model: org/b
    parameters: {weight: -0.4}
merge_method: task_arithmetic
chat_template: auto
"""
DELLA = """
models:
  - model: org/a
    parameters: &first {density: 0.7, epsilon: 0.1, weight: 0.5}
  - model: org/b
    parameters: {<<: *first, density: 0.4}
merge_method: della
base_model: {path: org/base, revision: main}
parameters: {normalize: false, lambda: 1}
"""
MODULES = """
base_model: org/base
dtype: bfloat16
merge_method: della_linear
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 40]
        model: ./intermediates/First
        parameters:
          density: 0.5
          epsilon: 0.4
          weight: [0.9, 0.2, 0.95]
      - layer_range: [0, 40]
        model: org/base
    parameters:
      lambda:
      - filter: mlp
        value: 0.5
parameters:
  int8_mask: 1.0
  lambda: 1.0
  normalize: 1.0
tokenizer: {}
"""
TOKENS = """
merge_method: linear
models:
  - {model: org/a, parameters: {weight: 0.5}}
  - {model: org/b, parameters: {weight: 0.5}}
base_model: org/a
tokenizer:
  source: union
  tokens:
    <|im_start|>:
      source: org/b
    <|im_end|>:
      source: {kind: model_token, model: org/a, token: </s>}
      force: true
    <|pad|>:
      source: {kind: zero}
    <|odd|>:
      source: {kind: model_token, model: org/a, token_id: 7}
    <|plain|>: {}
  pad_to_multiple_of: 64
chat_template: chatml
"""
OURS = """
merge_method: fisher
models:
  - {model: a, fisher: fisher-a, parameters: {weight: 0.6}}
  - {model: b, fisher: fisher-b, parameters: {weight: 0.4}}
base_model: base
parameters:
  power:
    - {glob: "*.mlp.*", value: 0.5}
    - {value: 1}
  floor: 1e-6
head: keep-first
include: "model.*"
exclude: ["*.bias", "*norm*"]
seed: 3
"""
TEXTS = {
    "slerp": SLERP,
    "ties": TIES,
    "dare-ties": DARE_TIES,
    "passthrough": FRANKENMERGE,
    "linear": LINEAR,
    "model-stock": MODEL_STOCK,
    "task-arithmetic": TASK_ARITHMETIC,
    "della": DELLA,
    "della-linear": MODULES,
    "tokens": TOKENS,
    "fisher": OURS,
}


def recipe_of(text: str) -> Recipe:
    return parse_recipe(yaml.safe_load(text), "recipe.yml")


def method_of(name: str, function: Any) -> Method:
    """As the registry makes one of a file."""
    parameters = inspect.signature(function).parameters.values()
    return Method(
        name,
        function,
        {p.name: p.default is p.empty for p in parameters if p.kind is not p.KEYWORD_ONLY},
        {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
    )


def _linear(models: Any, weights: Any, *, normalize: bool = True) -> None: ...


def _slerp(models: Any, weights: Any, *, t: float | None = None) -> None: ...


def _ties(
    models: Any,
    weights: Any,
    base: Any,
    *,
    density: PerModel = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> None: ...


def _della(
    models: Any,
    weights: Any,
    base: Any,
    *,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    normalize: bool = True,
    lambda_: float = 1.0,
) -> None: ...


def _passthrough(models: Any, *, scale: float = 1.0) -> None: ...


def _model_stock(models: Any, base: Any, *, filter_wise: bool = False) -> None: ...


def _fisher(
    models: Any,
    weights: Any,
    fishers: Any,
    base: Any = None,
    *,
    power: float = 1.0,
    floor: float | None = None,
    rounds: int = 3,
    words: str = "x",
) -> None: ...


FUNCTIONS: dict[str, Any] = {
    "slerp": _slerp,
    "ties": _ties,
    "dare-ties": _ties,
    "passthrough": _passthrough,
    "linear": _linear,
    "tokens": _linear,
    "model-stock": _model_stock,
    "task-arithmetic": _ties,
    "della": _della,
    "della-linear": _della,
    "fisher": _fisher,
}
METHODS = {name: method_of(name, function) for name, function in FUNCTIONS.items()}
"""Like the registered ones, but for their mathematics."""
