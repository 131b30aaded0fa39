"""The plug-in by which transformers loads, saves, trains and dequantizes low-rank checkpoints.

Importing this registers it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from fishertool.checkpoint.header import read_header
from fishertool.checkpoint.reader import Checkpoint, Shard
from fishertool.errors import InputError
from fishertool.models.low_rank import Factors, factors_of, quantization_config
from fishertool.models.low_rank_layers import LowRank, LowRankEmbedding
from fishertool.models.low_rank_loading import check_loaded, modules_of, put_in
from fishertool.models.probes import origins
from fishertool.plugin import METHOD


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json, as it stands there: the quantizer, which knows the
    folder, checks it."""

    def __init__(
        self, ranks: Any = None, format_version: Any = None, embedding: Any = None, **more: Any
    ):
        self.quant_method = METHOD
        self.format_version = format_version
        self.ranks = ranks
        if embedding is not None:
            self.embedding = embedding


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts low-rank layers in place of dense ones before the weights are loaded."""

    requires_calibration = True  # as transformers calls what it cannot make out of dense weights
    is_trainable = True
    is_qat_trainable = True  # or Trainer would ask for an adapter

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **more: Any
    ) -> None:
        with _open(model, checkpoint_files) as checkpoint:
            factors = factors_of(checkpoint, self.quantization_config.to_dict())
            modules = modules_of(model, factors, checkpoint)
        put_in(model, modules)
        self._loading: tuple[Sequence[str] | None, Mapping[str, Factors]] = (
            checkpoint_files,
            modules,
        )

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> None:
        checkpoint_files, modules = self._loading
        del self._loading
        with _open(model, checkpoint_files) as checkpoint:
            check_loaded(model, modules, checkpoint)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called first by `save_pretrained`: config.json gets the names that it saves under."""
        parameters = dict(model.named_parameters())
        names = {one.name: name for name, one in origins(model, parameters).items() if one}
        ranks, embedding = {}, None
        for module, layer in model.named_modules():
            down = names.get(f"{module}.down.weight")
            if isinstance(layer, LowRank) and down is not None:
                on_disk = down.removesuffix(".down.weight")
                ranks[on_disk] = layer.rank
                if isinstance(layer, LowRankEmbedding):
                    embedding = on_disk
        model.config.quantization_config = LowRankConfig(**quantization_config(ranks, embedding))
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # what `save_pretrained` leaves in the config
            dtype = getattr(torch, dtype)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LowRank):
                model.set_submodule(name, layer.dense(dtype or layer.weight.dtype))
        return model


def _open(model: Any, files: Sequence[str] | None) -> Checkpoint:
    paths = [Path(file) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise InputError(
            f"{model.config.name_or_path or type(model).__name__}: low-rank weights are read from "
            "safetensors files alone"
        )
    return Checkpoint(paths[0].parent, [Shard(path, read_header(path)) for path in paths])


if METHOD not in AUTO_QUANTIZER_MAPPING:  # by an earlier import of this module
    register_quantization_config(METHOD)(LowRankConfig)
    register_quantizer(METHOD)(LowRankQuantizer)
