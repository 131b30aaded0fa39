"""Teaches transformers the low-rank format, whichever of the two is imported first.

transformers has no entry points for quantizers, and importing it takes seconds that the command
line must not spend on `--help`. So its package of quantizers is watched for: what the plug-in needs
is imported right after it, or at once where it is there already.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "transformers.quantizers"
METHOD = "low_rank"
"""The format's name among the quantizers, in config.json too."""


def is_low_rank(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config.json is in the low-rank format."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def install() -> None:
    """Register the low-rank quantizer now or when transformers loads; again changes nothing."""
    if WATCHED in sys.modules:
        _register()
    elif not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # An import alone: where the plug-in's own import led here, it is not whole yet, and registers
    # once it is.
    import fishertool.models.quantizer  # noqa: F401


class _Finder(MetaPathFinder):
    """Finds the watched package where the other finders do, and has it loaded by _Loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Another loader, which the module gets back before it runs; registers after."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
