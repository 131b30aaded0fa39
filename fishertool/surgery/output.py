"""What a transformation wrote, as its report tells it."""

from collections.abc import Sequence
from dataclasses import asdict

from fishertool.checkpoint.companions import Companions
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import Layout
from fishertool.report import Output


def checkpoint_output(
    layout: Layout, digests: Sequence[FileDigest], companions: Companions
) -> Output:
    """A checkpoint as it was written."""
    return Output(
        list(map(asdict, digests)),
        layout.nbytes,
        layout.parameters,
        layout.dtype,
        list(companions.copied),
        list(companions.left_out),
    )
