"""A base model by the names of the models made from it: as a part of them its tensors have a prefix."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.source import SourceView, TensorSource
from fishertool.models.names import model_class_of


class Prefixed(SourceView):
    """A source whose tensors have other names.

    names  name here -> name there
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]):
        super().__init__(source)
        self.names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def info(self, name: str) -> TensorInfo:
        return replace(self.source.info(self.names[name]), name=name)

    def where(self, name: str) -> str:
        return self.source.where(self.names.get(name, name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.names[name], start, stop)


def named_like(source: TensorSource, model: TensorSource) -> TensorSource:
    """A source by a model's names, where its own are the same but for the base model's prefix:
    `h.0.ln_1.weight` in a GPT-2, `transformer.h.0.ln_1.weight` in one with a head."""
    model_class = model_class_of(model)
    prefix = f"{getattr(model_class, 'base_model_prefix', '')}."
    names = {}
    for name in source:
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        moved = name not in model and other in model and other not in source
        names[other if moved else name] = name
    return source if all(name in source for name in names) else Prefixed(source, names)
