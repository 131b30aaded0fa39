"""A Fisher sidecar on disk: a lazy mapping of the checkpoint's own tensor names, with its header.

A sidecar is a folder with one safetensors checkpoint a kind (`diagonal.safetensors`) and a report.
"""

from pathlib import Path

from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError
from fishertool.fisher.header import FisherHeader

KINDS = ("diagonal",)


def open_sidecar(folder: Path, kind: str = "diagonal") -> tuple[Checkpoint, FisherHeader]:
    """Open one kind of a sidecar and check its header against its tensors.

    Raises InputError for a folder that is no sidecar, or whose header and tensors disagree.
    """
    tensors = open_checkpoint(folder, stem=kind)
    try:
        header = FisherHeader.from_metadata(tensors.metadata, f"{folder}")
        if header.kind != kind:
            raise InputError(f"{folder}: says it is {header.kind}, expected {kind}")
        if set(header.statistics) != set(tensors):
            raise InputError(f"{folder}: its header and its tensors have different names")
    except BaseException:
        tensors.close()
        raise
    return tensors, header


def check_fits(tensors: Checkpoint, header: FisherHeader, model: Checkpoint) -> None:
    """Refuse a sidecar estimated on other weights than these: order on the command line matters."""
    for name in tensors:
        if name not in model:
            raise InputError(f"{tensors.where(name)}: {model.folder} has no such tensor")
        mine, theirs = model.info(name).shape, tensors.info(name).shape
        if mine != theirs:
            raise InputError(
                f"{tensors.where(name)} is {list(theirs)}, but {list(mine)} in {model.folder}"
            )
    if header.fingerprint != model.fingerprint():
        raise InputError(
            f"{tensors.folder}: was estimated on other weights ({header.model}) than "
            f"{model.folder}; give --fisher in the order of the models, or estimate it again"
        )
