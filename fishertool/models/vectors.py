"""Texts as vectors, by the model itself; and examples chosen by them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import CalibrationData, DataOptions, Example
from fishertool.calibration.choice import at_random, kmeans
from fishertool.errors import InputError
from fishertool.fisher.batches import micro_batches
from fishertool.models.loading import LoadedModel
from fishertool.models.padding import ALONE, padding_matters
from fishertool.models.sentence_scorer import MODES, SentenceScorer
from fishertool.models.tasks import LABELS, TASKS, collate

Inputs = Mapping[str, list[int]]


@torch.no_grad()
def vectors_of(
    model: LoadedModel,
    texts: Sequence[Inputs],
    size: int | None = None,
    warn: Callable[[str], None] = lambda told: None,
) -> Tensor:
    """A unit vector a text, [text, feature], float32, on the CPU: that of an embedding model, or
    the mean over tokens of the last hidden state (an encoder's, where there is one).

    `size` is texts a micro-batch; None goes by tokens. A model that padding matters to gets one
    text at a time, and `warn` is told.
    """
    model.module.eval()
    examples = [
        Example({k: ids for k, ids in one.items() if k != LABELS}, None, 0) for one in texts
    ]

    def run(some: Sequence[Example]) -> Tensor:
        places, device = range(len(some)), str(model.device)
        return _encoded(
            model, collate(TASKS["embedding"], some, places, model.pad_id, device).inputs
        )

    if size != 1 and padding_matters(run, examples):
        size = 1
        warn(ALONE)
    found: dict[int, Tensor] = {}
    for batch in micro_batches([example.length for example in examples], size=size):
        found |= zip(batch, run([examples[n] for n in batch]).float().cpu(), strict=True)
    return torch.stack([found[n] for n in range(len(texts))])


def _encoded(model: LoadedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    if isinstance(model.module, SentenceScorer):
        return model.module.encode(**inputs)
    pretrained: Any = model.pretrained
    body = (
        pretrained.get_encoder() if pretrained.config.is_encoder_decoder else pretrained.base_model
    )
    hidden = body(**inputs).last_hidden_state.float()
    return torch.nn.functional.normalize(MODES["mean"](hidden, inputs["attention_mask"].float()))


def choose(pool: CalibrationData, options: DataOptions, model: LoadedModel) -> CalibrationData:
    """The `num_examples` of the pool that `options.select` takes, in their order.

    `kmeans` takes the example nearest to each of `num_examples` centres, by the vectors of the
    texts (of a query, not of its documents). Source: GAPrune, Tang and Yang 2025, arXiv
    2509.10844, which samples its data so. Raises InputError where there is nothing to choose from.
    """
    count, size = options.num_examples, len(pool.examples)
    assert count is not None
    if count > size:
        raise InputError(
            f"{options.data}: --select takes --num-examples {count} of a pool of {size}; take fewer, "
            "or leave --select out"
        )
    generator = torch.Generator().manual_seed(options.seed)
    told: dict[str, Any] = {"method": options.select, "pool": size, "seed": options.seed}
    if options.select == "random":
        chosen = at_random(size, count, generator)
    else:
        vectors = vectors_of(model, [example.inputs for example in pool.examples])
        clusters = kmeans(vectors, count, generator)
        chosen = clusters.nearest()
        told |= {
            "inertia": float(f"{clusters.inertia:.6g}"),  # beyond that, rounding
            "iterations": clusters.iterations,
        }
    return replace(pool, examples=[pool.examples[n] for n in chosen], selection=told)
