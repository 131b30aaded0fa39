"""Recovery: a short fine-tuning of a model that surgery has hurt, on calibration data.

A loop around torch's AdamW, not transformers' Trainer: that one needs accelerate, which is an extra
here, seeds and prints for the whole process, and would be left with nothing but the loop, as batches,
loss and masks are ours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishertool.calibration import CalibrationData
from fishertool.checkpoint.dtypes import all_finite, representable
from fishertool.errors import InputError
from fishertool.fisher.batches import Batch, logits_of, micro_batches
from fishertool.models.loading import LoadedModel
from fishertool.models.low_rank_layers import LowRank
from fishertool.models.tasks import Task, collate

MAX_GRADIENT_NORM = 1.0
WARM_UP = 10
"""One step in so many raises the learning rate; after them it falls to zero in a line."""


@dataclass(frozen=True)
class Recovery:
    """What a recovery did. Losses are means of -log p over the predictions of its examples."""

    steps: int
    examples: int
    """Different ones that were trained on."""
    parameters: int
    """Numbers that were trained."""
    loss_before: float
    loss_after: float


def recover(
    model: LoadedModel,
    task: Task,
    data: CalibrationData,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    masks: Sequence[tuple[Tensor, Tensor]] = (),
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> Recovery:
    """Train `model` in place by AdamW on the mean of -log p over a batch's predictions.

    A low-rank model's factors (with their biases) are trained; of another, all parameters. Weights of a
    narrower dtype than float32 are trained as float32 copies, and rounded after each step.

    masks  weights, or views of them, and boolean tensors of their shapes: where False, a weight is
           zero, and stays so exactly

    Raises InputError for data without labels, and where the loss is not finite.
    """
    if not data.labelled:
        raise InputError(f"{data.name}: has no labels to train on")
    device = str(model.device)
    batches = list(_batches(data, steps, batch_size, seed))
    chosen = sorted({index for batch in batches for index in batch})

    sizes = [one.size for one in data.examples]
    rows = [len(one.texts) for one in data.examples]

    def collated(indices: Sequence[int]) -> list[Batch]:
        micro = micro_batches(sizes, indices, rows_each=rows)
        return [collate(task, data.examples, each, model.pad_id, device) for each in micro]

    kept = _whole_masks(model.module, masks)
    with torch.no_grad():
        for parameter, mask in kept:
            parameter.masked_fill_(~mask, 0)
    before = _mean_loss(model.module, collated(chosen))
    with _training(model, seed) as trained:
        _train(model.module, trained, kept, map(collated, batches), steps, learning_rate, advance)
    after = _mean_loss(model.module, collated(chosen))
    if not math.isfinite(after):
        raise InputError(
            f"recovery: the loss is not finite after step {steps}; lower the learning rate"
        )
    return Recovery(steps, len(chosen), sum(one.numel() for one in trained), before, after)


def check_trained(name: str, values: Tensor) -> None:
    """Raises InputError if these, of a trained tensor as it is to be stored, have NaN or Inf."""
    if not all_finite(values):
        raise InputError(
            f"recovery: tensor {name}: is not finite as {str(values.dtype).removeprefix('torch.')} "
            "after training; lower the learning rate"
        )


def as_stored(trained: Tensor, stored: Tensor) -> Tensor:
    """What was trained, in the dtype on disk. Where that is finer than the model's, what training
    added to what the model was loaded from."""
    if stored.dtype.itemsize <= trained.dtype.itemsize:
        return representable(trained, stored.dtype).to(stored.dtype)
    return stored + (trained.to(stored.dtype) - stored.to(trained.dtype).to(stored.dtype))


def _batches(data: CalibrationData, steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of examples: all of them in random order, then all again."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data.examples)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(batch_size, count):
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:batch_size]
        del queue[:batch_size]


def _whole_masks(
    module: nn.Module, masks: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Masks of views, put together to masks of the parameters they are views of."""
    owners = {one.untyped_storage().data_ptr(): one for one in module.parameters()}
    whole: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for view, mask in masks:
        storage = view.untyped_storage().data_ptr()
        owner = owners[storage]
        _, full = whole.setdefault(storage, (owner, torch.ones_like(owner, dtype=torch.bool)))
        start = int(view.storage_offset()) - int(owner.storage_offset())
        full.as_strided(view.shape, view.stride(), start).logical_and_(mask.to(full.device))
    return list(whole.values())


@contextmanager
def _training(model: LoadedModel, seed: int) -> Iterator[list[nn.Parameter]]:
    """Train mode, with gradients for the parameters to train alone, and dropout by the seed."""
    layers = [one for one in model.pretrained.modules() if isinstance(one, LowRank)]
    sources: Sequence[nn.Module] = layers or [model.pretrained]
    trained = [one for source in sources for one in source.parameters()]
    wanted = {one: one.requires_grad for one in model.module.parameters()}
    devices = [torch.device(one) for one in model.devices if one.startswith("cuda")]
    model.module.requires_grad_(False).train()
    for one in trained:
        one.requires_grad_(True)
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield trained
    finally:
        model.module.eval()
        for parameter, had in wanted.items():
            parameter.requires_grad_(had)
            parameter.grad = None


def _train(
    module: nn.Module,
    trained: Sequence[nn.Parameter],
    kept: Sequence[tuple[nn.Parameter, Tensor]],
    batches: Iterator[list[Batch]],
    steps: int,
    learning_rate: float,
    advance: Callable[[int], None],
) -> None:
    masters = [one if one.dtype.itemsize >= 4 else one.detach().float() for one in trained]
    optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rise_and_fall(steps))
    for number, batch in enumerate(batches, start=1):
        scored = sum(int(part.scored.sum()) for part in batch)
        loss = 0.0
        for part in batch:
            summed = _loss(module, part) / scored
            summed.backward()  # type: ignore[no-untyped-call]
            loss += float(summed.detach())
        if not math.isfinite(loss):
            raise InputError(
                f"recovery: the loss is not finite at step {number}; lower the learning rate"
            )
        for parameter, mask in kept:
            if parameter.grad is not None:  # without a gradient, AdamW leaves a zero alone
                parameter.grad.masked_fill_(~mask, 0)
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                if master is not parameter and parameter.grad is not None:
                    master.grad, parameter.grad = parameter.grad.float(), None
            nn.utils.clip_grad_norm_(masters, MAX_GRADIENT_NORM)
            optimizer.step()
            for parameter, master in zip(trained, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        optimizer.zero_grad()
        schedule.step()
        advance(1)


def _rise_and_fall(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step, counted from 0."""
    rising = max(1, steps // WARM_UP)
    return lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1))


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    """-log p summed over what is scored."""
    logits = logits_of(module, batch)
    batch = batch.beside(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(
        logits[batch.scored].to(wide), batch.targets[batch.scored], reduction="sum"
    )


@torch.no_grad()
def _mean_loss(module: nn.Module, batches: Sequence[Batch]) -> float:
    scored = sum(int(batch.scored.sum()) for batch in batches)
    return sum(float(_loss(module, batch)) for batch in batches) / scored
