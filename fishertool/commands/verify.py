"""`fishertool verify`: whether an output is what its report says, and would load."""

from contextlib import ExitStack
from pathlib import Path

from fishertool import hub
from fishertool.errors import InputError
from fishertool.inspection.place import place_of
from fishertool.inspection.verification import Verification
from fishertool.inspection.written import Written, read_written
from fishertool.progress import Track, silent
from fishertool.report import Files, Report, environment, options_of, public_name

NO_REPORT = "there is no report in it, so what was written cannot be told; the rest was verified"
ROLES = {"checkpoint": "model", "adapter": "adapter", "sidecar": "fisher", "part": "part"}


def verify(
    out: str,
    *,
    allow_nonfinite: bool = False,
    load: bool = True,
    threads: int = 1,
    track: Track = silent,
) -> Report:
    """Hold an output against its report, its config.json and, with `load`, transformers.

    Every file is read and hashed anew, and nothing is written. What is wrong is in `findings` of
    the summary, a sentence each. Raises InputError for a folder that holds nothing to verify.
    """
    report = Report("verify", options_of(locals()), environment=environment(threads, "cpu"))
    with ExitStack() as opened:
        with report.phase("open"):
            # Absolute, so that messages can be made to name no folder of this machine.
            folder = hub.resolve(out).absolute()
            written, unreadable = _read_written(folder)
            if written is not None and written.command == "search":
                way_out = "it picked no merge to verify; --resume --pick writes one"
                if (folder / "picked").is_dir():
                    way_out = f"verify what it picked, in {public_name(out)}/picked"
                raise InputError(f"{out}: is a search, whose report names no files; {way_out}")
            place = place_of(folder)
            found = Verification(place, written, opened)
            found.findings += unreadable
        with report.phase("check"):
            found.check_headers()
        total = sum(info.elements for one in found.checkpoints for info in one.infos().values())
        with report.phase("read"), track("Verifying", total, "weights") as advance:
            found.check_values(threads, allow_nonfinite, advance)
        with report.phase("digest"):
            digests = found.check_files()
        if load:
            with report.phase("load"):
                found.check_loads()
    report.inputs = [Files.of(public_name(out), ROLES[place.what], digests)]
    report.warnings = [] if written or unreadable else [f"{public_name(out)}: {NO_REPORT}"]
    report.warnings += map(found.public, found.warnings)
    report.summary = found.summary()
    report.status = "faulty" if found.findings else "ok"
    return report


def _read_written(folder: Path) -> tuple[Written | None, list[str]]:
    """The report, and what is wrong with it."""
    try:
        return read_written(folder), []
    except InputError as error:
        return None, [str(error)]
