"""What a transformation wrote, as its report tells it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fishertool.checkpoint.companions import Companions, digests_beside
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout
from fishertool.errors import some
from fishertool.report import Output

if TYPE_CHECKING:  # it needs torch, and what only looks does not
    from fishertool.checkpoint.source import TensorSource

BASE_RSS_BYTES = 400_000_000
"""What the process takes before it holds a weight."""


def row_of(tensor: TensorInfo, action: str, **more: Any) -> dict[str, Any]:
    """What became of a tensor, as all reports tell it."""
    about = {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
    return {**about, "action": action, **more}


def checkpoint_output(
    layout: Layout,
    digests: Sequence[FileDigest],
    companions: Companions,
    folder: Path,
    place: Path | None = None,
    work: Path | None = None,
) -> Output:
    """A checkpoint as it was written into `folder`, its tensors into `place` where that is another;
    without what is in `work`."""
    tensors = {home / one.file for one in digests for home in (folder, place or folder)}
    beside = digests_beside(folder, tensors if work is None else {*tensors, work})
    written = {one.file for one in beside}
    left_out = [name for name in companions.left_out if name not in written]
    return Output.of(digests, layout.parameters, layout.dtype, beside, left_out)


def code_left_out(checkpoint: "TensorSource", companions: Mapping[Path, Companions]) -> list[str]:
    """What to tell of a checkpoint whose config.json names code beside it: that is never copied."""
    found = companions[checkpoint.folder]
    code = [name for name in found.left_out if name.endswith(".py")]
    if not code or "auto_map" not in checkpoint.config():
        return []
    return [
        f"config.json names code of the model's own (auto_map), which is never copied: {some(code)}; "
        "where it is to be loaded with this code, read that and put it beside the output"
    ]
