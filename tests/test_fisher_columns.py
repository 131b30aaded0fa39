"""A bank on disk, read by its columns, is the bank in memory."""

from pathlib import Path

import pytest
import torch
from test_fisher_rank_one import DAMPING, SHAPES, dense, draw, error, pieces, vectors
from torch import Tensor

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.fisher import columns
from fishertool.fisher.columns import HeldGradients, PartialGradients
from fishertool.fisher.rank_one import RankOneFisher
from fishertool.sidecar import StoredGradients

__all__ = ["pieces"]  # a fixture


def store(folder: Path, tensors: dict[str, Tensor], dtype: str, shard_bytes: int) -> Checkpoint:
    infos = [TensorInfo(name, dtype, tuple(value.shape)) for name, value in tensors.items()]
    layout = lay_out(infos, shard_bytes, stem="rank-one", metadata={})
    with CheckpointWriter(folder, layout) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
        writer.finish()
    return open_checkpoint(folder, stem="rank-one")


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("block", [None, 4, 7])
@pytest.mark.parametrize(("stored", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16)])
def test_a_bank_on_disk_is_the_bank_in_memory(
    tmp_path: Path, stored: str, dtype: torch.dtype, block: int | None
) -> None:
    gradients = {name: value.to(dtype) for name, value in draw(6, SHAPES["several"]).items()}
    with store(tmp_path, gradients, stored, shard_bytes=1000) as tensors:
        source = StoredGradients(tensors)
        held = HeldGradients({name: gradients[name] for name in source.sizes})
        one, other = (RankOneFisher(bank, DAMPING, block) for bank in (source, held))
        x = vectors(one.size)
        assert torch.equal(one.inverse_diagonal(), other.inverse_diagonal())
        assert torch.equal(one.solve(x), other.solve(x))
        assert torch.equal(one.diagonal(), other.diagonal())
        expected = torch.linalg.inv(dense(held_rows(held), DAMPING, block))
        assert error(one.solve(x), expected @ x) < 1e-12
        some = StoredGradients(tensors, ["w3"])
        assert some.sizes == {"w3": 33}
        assert torch.equal(some.read("w3", 5, 31), gradients["w3"].reshape(6, 33)[:, 5:31])
        part = PartialGradients(some, {"part": ("w3", 11, 20)})
        assert (part.members, part.sizes) == (6, {"part": 20})
        assert torch.equal(part.read("part", 2, 20), some.read("w3", 13, 31))


def held_rows(bank: HeldGradients) -> dict[str, Tensor]:
    return {name: bank.read(name, 0, size) for name, size in bank.sizes.items()}


def test_reads_of_a_bank_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "READ_ELEMENTS", 128)
    with store(tmp_path, draw(6, [(50, 40)]), "F32", 1 << 20) as tensors:
        source, reads = StoredGradients(tensors), list[int]()
        read = source.read

        def watched(name: str, start: int, stop: int) -> Tensor:
            reads.append((stop - start) * source.members)
            return read(name, start, stop)

        monkeypatch.setattr(source, "read", watched)
        for block in (None, 10):
            RankOneFisher(source, DAMPING, block).inverse_diagonal()
        assert max(reads) <= 128
        assert tensors.digests()[0].sha256  # reads in columns do not disturb it
        with pytest.raises(IndexError, match="whose entries have 2000"):
            tensors.read_columns("w0", 0, 2001)


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        ({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, "F32", "tensor b: has 3 members, a has 2"),
        ({"a": torch.ones(())}, "F32", "tensor a: F32 .* holds no gradients"),
        ({"a": torch.ones(2, 3, dtype=torch.long)}, "I64", "tensor a: I64 .* holds no gradients"),
    ],
    ids=["members", "scalar", "integers"],
)
def test_what_is_no_bank_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: str, message: str
) -> None:
    with (
        store(tmp_path, tensors, dtype, 1 << 20) as opened,
        pytest.raises(InputError, match=message),
    ):
        StoredGradients(opened)
