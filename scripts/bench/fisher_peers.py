"""What scripts/bench/fisher.py compares with: plain training steps, and what one would take instead."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from fisher_case import Case, loss_of
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fishertool.fisher.batches import Batch

CHUNK = 4
"""Examples that torch.func takes at once: with more it was slower, and took more memory."""


def floor(case: Case, full: bool = False) -> None:
    """Batched forward + backward: the gradient of the batch loss."""
    for batch in case.batches(case.batch_size, full):
        case.model.zero_grad(set_to_none=True)
        backward(case.model, batch)
    case.model.zero_grad(set_to_none=True)


def loop(case: Case) -> None:
    """One backward pass an example, gradients squared and added: what one writes at first."""
    sums = [torch.zeros_like(parameter) for parameter in case.model.parameters()]
    for batch in case.batches(1):
        case.model.zero_grad(set_to_none=True)
        backward(case.model, batch)
        for total, parameter in zip(sums, case.model.parameters(), strict=True):
            if parameter.grad is not None:
                total.addcmul_(parameter.grad, parameter.grad)
    case.model.zero_grad(set_to_none=True)


def opacus(case: Case) -> None:
    """opacus.GradSampleModule, which finds per-example gradients in train mode only."""
    from opacus import GradSampleModule

    sums = [torch.zeros_like(parameter) for parameter in case.model.parameters()]
    wrapped = GradSampleModule(case.model, loss_reduction="sum", strict=False)
    wrapped.train()
    try:
        for batch in case.batches(case.batch_size):
            backward(wrapped, batch)
            for total, parameter in zip(sums, case.model.parameters(), strict=True):
                total += parameter.grad_sample.square().sum(0)
            wrapped.zero_grad(set_to_none=True)
    finally:
        wrapped.to_standard_module()
        case.model.eval()


def functorch(case: Case) -> None:
    """torch.func: vmap of grad over the examples of a chunk."""
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss(
        parameters: dict[str, Tensor], inputs: dict[str, Tensor], targets: Tensor, scored: Tensor
    ) -> Tensor:
        rows = {name: x.unsqueeze(0) for name, x in inputs.items()}
        logits = functional_call(case.model, parameters, (), rows).logits
        return loss_of(logits, targets.unsqueeze(0), scored.unsqueeze(0))

    gradients_of = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    for batch in case.batches(CHUNK):
        inputs = dict(batch.inputs, attention_mask=square_mask(case, batch))
        gradients = gradients_of(parameters, inputs, batch.targets, batch.scored)
        for name, gradient in gradients.items():
            sums[name] += gradient.square().sum(0)


def square_mask(case: Case, batch: Batch) -> Tensor:
    """[example, 1, time, time]: a plain mask is looked into by transformers, which vmap refuses."""
    mask = batch.inputs["attention_mask"].bool()[:, None, None, :]
    seen = mask.expand(-1, -1, mask.shape[-1], -1)
    return seen.tril() if case.task.name == "causal-lm" else seen


def backward(model: Any, batch: Batch) -> None:
    logits = model(**batch.inputs).logits
    loss_of(logits, batch.targets, batch.scored).backward()  # type: ignore[no-untyped-call]


PEERS: dict[str, Callable[[Case], None]] = {"loop": loop, "torch.func": functorch, "opacus": opacus}


def installed(mode: str) -> bool:
    return mode != "opacus" or importlib.util.find_spec(mode) is not None
