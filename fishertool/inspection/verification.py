"""An output under verification: what is open of it, and what was found to be wrong."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import main_dtype
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError, some
from fishertool.fisher.header import FisherHeader
from fishertool.inspection.files import extra_files, faults_of_files
from fishertool.inspection.fishers import About, about_of
from fishertool.inspection.place import Place
from fishertool.inspection.rows import (
    counted,
    faults_of_kind,
    faults_of_rows,
    faults_of_zeros,
)
from fishertool.inspection.values import look_through
from fishertool.inspection.written import Written
from fishertool.models.adapters import open_adapter
from fishertool.models.loadable import cannot_be_tried, loading_faults
from fishertool.models.low_rank import Factors, factors_of
from fishertool.plugin import is_low_rank
from fishertool.progress import Advance


class Verification:
    """Each check adds to `findings` what it finds, and goes on. What could not be opened, or has
    no config.json, is not looked at any further."""

    def __init__(self, place: Place, written: Written | None, opened: ExitStack):
        self.place, self.written = place, written
        self.findings: list[str] = []
        self.warnings: list[str] = []
        self._nonfinite = 0
        self._loads: bool | None = None
        self._opened: dict[str, tuple[Checkpoint, About]] = {}
        self._config: dict[str, Any] | None = None
        for stem in place.stems:
            try:
                checkpoint = opened.enter_context(open_checkpoint(place.weights, stem))
                self._opened[stem] = checkpoint, about_of(place, stem, checkpoint)
            except InputError as error:
                self.findings.append(str(error))
                continue
            for shard in checkpoint.shards:
                shard.hash_anew()

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [checkpoint for checkpoint, _ in self._opened.values()]

    @property
    def _rows_are_of_it(self) -> bool:
        """An adapter's report tells of the merged model's tensors instead."""
        return self.place.what == "checkpoint"

    def check_headers(self) -> None:
        """Names, shapes, dtypes and counts, against the report and config.json."""
        for checkpoint, about in self._opened.values():
            if self.place.what == "checkpoint":
                self._check_checkpoint(checkpoint)
            elif self.place.what == "sidecar" and isinstance(about, FisherHeader):
                self._check_kind(checkpoint, about)
        if self.place.what == "adapter" and self._opened:
            try:
                with open_adapter(self.place.top):
                    pass
            except InputError as error:
                self.findings.append(str(error))
        if self.written is not None and len(self._opened) == len(self.place.stems):
            self._check_count(self.written)

    def _check_count(self, written: Written) -> None:
        infos = [info for one in self.checkpoints for info in one.infos().values()]
        elements = sum(info.elements for info in infos)
        # Of an adapter only what differs from the base is counted, not what goes along with it.
        counts = self.place.what != "adapter" and written.parameters is not None
        if counts and elements != written.parameters:
            self.findings.append(
                f"its tensors have {elements} parameters, and {written.parameters} in the report"
            )

    def _check_checkpoint(self, checkpoint: Checkpoint) -> None:
        try:
            config = self._config = checkpoint.config()
            factors = self._factors(checkpoint, config)
        except InputError as error:
            self.findings.append(str(error))
            return
        dtype = main_dtype(checkpoint.infos().values())
        stated = config.get("dtype", config.get("torch_dtype"))
        foreign = "quantization_config" in config and not is_low_rank(config)
        if stated not in (None, dtype) and not foreign:
            told = f"config.json: says {stated}, and most weights are {dtype}"
            # Of models that others wrote, some are so on purpose.
            (self.warnings if self.written is None else self.findings).append(told)
        if self.written is None:
            return
        if self.written.dtype not in (None, dtype):
            self.findings.append(
                f"most weights are {dtype}, and {self.written.dtype} in the report"
            )
        if self.written.rows:
            self.findings += faults_of_rows(self.written.rows, checkpoint, factors)

    def _factors(self, checkpoint: Checkpoint, config: dict[str, Any]) -> list[Factors]:
        if not is_low_rank(config):
            return []
        return factors_of(checkpoint, config["quantization_config"])

    def _check_kind(self, checkpoint: Checkpoint, header: FisherHeader) -> None:
        if self.written is None:
            return
        source = self.place.top / REPORT_FILE
        self.findings += faults_of_kind(self.written.rows, checkpoint, header, source)
        told = self.written.summary.get("fingerprint")
        if told not in (None, header.fingerprint):
            self.findings.append(f"{header.kind}: is of another model than its report's")

    def check_values(self, threads: int, allow_nonfinite: bool, advance: Advance) -> None:
        """Read all there is: NaN, Inf, negative diagonals, and zeros that the report counts."""
        rows = self.written.rows if self.written is not None and self._rows_are_of_it else ()
        for stem, (checkpoint, _) in self._opened.items():
            kind = stem if self.place.what == "sidecar" else None
            seen = look_through(checkpoint, kind, counted(rows), threads, advance)
            self._nonfinite += len(seen.nonfinite)
            if seen.nonfinite and not allow_nonfinite:
                self.findings.append(f"NaN or Inf in {_where(checkpoint, seen.nonfinite)}")
            if seen.negative:
                where = _where(checkpoint, seen.negative)
                self.findings.append(f"a mean of squares is below zero in {where}")
            self.findings += faults_of_zeros(rows, checkpoint, seen)

    def check_files(self) -> list[FileDigest]:
        """Bytes and SHA-256 against the report; those of the files that are open."""
        hashed = {
            shard.path: shard.digest.finish() for one in self.checkpoints for shard in one.shards
        }
        if self.written is not None:
            self.findings += faults_of_files(self.place, self.written, hashed)
        extra = extra_files(self.place, hashed, self.written)
        if extra and self.written is not None:
            self.findings.append(f"{some(extra)}: not named in its report")
        elif extra and self._opened:
            self.warnings.append(f"{some(extra)}: of no checkpoint here, and not verified")
        return list(hashed.values())

    def check_loads(self) -> None:
        """Whether transformers would load it, if it is a checkpoint whose headers can be read."""
        if self.place.what != "checkpoint" or self._config is None:
            return
        [checkpoint] = self.checkpoints
        if (why := cannot_be_tried(checkpoint)) is not None:
            self.warnings.append(f"{why}, so whether it loads was not verified")
            return
        faults = loading_faults(checkpoint)
        self._loads = not faults
        self.findings += faults

    def public(self, text: str) -> str:
        """The same without the folders of this machine, that one's own name included."""
        top = str(self.place.top)
        return text.replace(f"{top}/", "").replace(top, self.place.top.name)

    def summary(self) -> dict[str, Any]:
        infos = [info for one in self.checkpoints for info in one.infos().values()]
        shards = [shard for one in self.checkpoints for shard in one.shards]
        return {
            "what": self.place.what,
            "command": None if self.written is None else self.written.command,
            "files": len(shards),
            "bytes": sum(shard.path.stat().st_size for shard in shards),
            "tensors": len(infos),
            "parameters": sum(info.elements for info in infos),
            "nonfinite": self._nonfinite,
            "loads": self._loads,
            "findings": [self.public(one) for one in dict.fromkeys(self.findings)],
        }


def _where(checkpoint: Checkpoint, names: list[str]) -> str:
    """Tensors of a checkpoint, and the file of the first."""
    file = Path(checkpoint.where(names[0]).partition(": tensor ")[0]).name
    return f"{some(names)} ({file})" if len(names) == 1 else f"{some(names)} ({file}, ...)"
