"""`fishertool push`: an output folder -> a repository on the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from fishertool import hub, hub_push
from fishertool.checkpoint.against_report import difference
from fishertool.checkpoint.companions import loaded_beside
from fishertool.checkpoint.digest import FileDigest, digest
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.layout import main_dtype
from fishertool.checkpoint.published import (
    CARD,
    CONFIGS,
    Published,
    is_replaced,
    open_published,
)
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError, UsageError, some
from fishertool.hub_push import Pushed, Upload
from fishertool.model_card import Subject, model_card
from fishertool.report import (
    Files,
    Output,
    Report,
    environment,
    load_report,
    options_of,
    public_name,
)

PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def push(
    out: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool | None = None,
    message: str | None = None,
    card: Path | None = None,
    make_card: bool = True,
    dry_run: bool = False,
    bars: bool = False,
) -> Report:
    """Publish an output that is as its report says, with a model card, and look at what arrived.

    Nothing is written here. `pull_request` None is a pull request where the repository has files.
    """
    report = Report("push", options_of(locals()), environment=environment(1, "cpu"))
    with report.phase("check"):
        _check_flags(repo, revision, pull_request, card, make_card)
        found = open_published(out)
        written = load_report(out / REPORT_FILE) if REPORT_FILE in found.sent else None
        digests = _digests(found, written)
        subject = _subject(found, repo, written)
        report.warnings += _warnings(found, written, subject)
        report.inputs = [Files.of(public_name(out), _role(subject), digests)]
    with report.phase("card"):
        uploads = _uploads(found, digests, _card(found, subject, written, card, make_card))
        report.output = _output(found, written, uploads)
    if dry_run:
        report.status = "dry-run"
        report.summary = _plan(repo, uploads)
        return report
    with report.phase("upload"):
        pushed = hub_push.publish(
            repo,
            uploads,
            is_replaced=partial(is_replaced, sent=found.sent),
            private=private,
            revision=revision,
            pull_request=pull_request,
            message=message or _message(written),
            bars=bars,
        )
    report.output = _output(found, written, pushed.sent)
    report.warnings += [*_after(uploads, pushed), *pushed.warnings]
    report.summary = _summary(pushed)
    return report


def _check_flags(
    repo: str, revision: str | None, pull_request: bool | None, card: Path | None, make_card: bool
) -> None:
    hub_push.check_repository(repo)
    if pull_request and revision not in (None, hub_push.MAIN):
        raise UsageError("--pull-request is for the main branch; leave it or --revision out")
    if card is not None and not make_card:
        raise UsageError("--card and --no-card exclude each other")
    if card is not None and not card.is_file():
        raise UsageError(f"--card {card}: no such file")


def _digests(found: Published, written: Mapping[str, Any] | None) -> list[FileDigest]:
    """Of all that is sent. Raises InputError unless the files are those that the report lists."""
    inside = found.place.relative_to(found.folder)
    output = (written or {}).get("output") or {}
    told = [
        FileDigest((home / entry["file"]).as_posix(), entry["bytes"], entry["sha256"])
        for home, entries in (
            (inside, output.get("files", ())),
            (Path(), output.get("companions", ())),
        )
        for entry in entries
    ]
    listed = {one.file: one for one in told}
    wrong = [fault for one in told if (fault := difference(found.folder, one)) is not None]
    if written is not None:
        beside = [name for name in found.weights if (found.folder / name).parent == found.place]
        beside += loaded_beside(found.folder)
        wrong += [f"{name}: is not in {REPORT_FILE}" for name in beside if name not in listed]
    if wrong:
        raise InputError(
            f"{found.folder}: is not as it was written: {some(wrong)}; write it again, or remove "
            f"{REPORT_FILE} to publish it as it is"
        )
    return [
        listed.get(name) or replace(digest(found.folder / name, anew=True), file=name)
        for name in found.sent
    ]


def _subject(found: Published, repo: str, written: Mapping[str, Any] | None) -> Subject:
    config = next((name for name in CONFIGS if (found.place / name).is_file()), None)
    content = load_json(found.place / config) if config else {}
    if config is None:
        kind = "sidecar"
    elif config != "config.json":
        kind = "adapter"
    else:
        kind = "sentence-transformers" if "modules.json" in found.sent else "model"
    ids = [one["id"] for one in (written or {}).get("inputs", ()) if one["role"] != "data"]
    said = {content.get("license"), *map(hub.cached_license, ids)} - {None}
    return Subject(repo, kind, content, str(said.pop()) if len(said) == 1 else None)


def _role(subject: Subject) -> str:
    return {"sidecar": "fisher", "adapter": "adapter"}.get(subject.kind, "model")


def _card(
    found: Published,
    subject: Subject,
    written: Mapping[str, Any] | None,
    card: Path | None,
    make_card: bool,
) -> Upload | None:
    """README.md: the one that is given, or the folder's, or one that is made."""
    if not make_card:
        return None
    made = card is None and CARD not in found.sent
    if made:
        content = model_card(subject, written).encode()
    else:
        content = (card or found.folder / CARD).read_bytes()
    return Upload(CARD, content, len(content), sha256(content).hexdigest(), yields=made)


def _uploads(
    found: Published, digests: Sequence[FileDigest], card: Upload | None
) -> tuple[Upload, ...]:
    files = [
        Upload(one.file, found.folder / one.file, one.bytes, one.sha256)
        for one in digests
        if one.file != CARD
    ]
    return tuple(files if card is None else [card, *files])


def _output(
    found: Published, written: Mapping[str, Any] | None, uploads: Sequence[Upload]
) -> Output:
    told = (written or {}).get("output") or {}
    sent = [FileDigest(one.name, one.bytes, one.sha256) for one in uploads]
    tensors = [info for header in found.weights.values() for info in header.tensors.values()]
    return Output.of(
        [one for one in sent if one.file in found.weights],
        told.get("parameters", sum(info.elements for info in tensors)),
        told.get("dtype") or main_dtype(tensors),
        companions=[one for one in sent if one.file not in found.weights],
        left_out=found.left_out,
    )


def _warnings(found: Published, written: Mapping[str, Any] | None, subject: Subject) -> list[str]:
    told = []
    if written is None:
        told.append(
            f"{found.folder}: has no {REPORT_FILE}, so nothing tells whether its files are as they "
            "were written, or how"
        )
    if found.left_out:
        told.append(f"not published: {some(list(found.left_out))}")
    for name in found.sent:
        if name.endswith("config.json"):
            content = load_json(found.folder / name)
            told += [
                f"{name}: its {key} names a place on a machine, and is published"
                for key in PLACES
                if _is_a_place(content.get(key))
            ]
    base = subject.config.get("base_model_name_or_path")
    if subject.kind == "adapter" and ("/" not in str(base) or _is_a_place(base)):
        told.append(
            f"adapter_config.json: its base is {public_name(str(base))}, which is no Hub id; whoever "
            "loads the adapter must have that model"
        )
    return told


def _is_a_place(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith(("/", "~", "."))) or "\\" in str(value)


def _plan(repo: str, uploads: Sequence[Upload]) -> dict[str, Any]:
    made = [one.content for one in uploads if isinstance(one.content, bytes)]
    return {
        "repository": repo,
        "files": len(uploads),
        "bytes": sum(one.bytes for one in uploads),
        "sent": {one.name: one.bytes for one in uploads},
        "card": made[0].decode(errors="replace") if made else None,
    }


def _summary(pushed: Pushed) -> dict[str, Any]:
    return {
        "repository": pushed.repository,
        "created": pushed.created,
        "pull_request": pushed.pull_request,
        "commit": pushed.commit,
        "revision": pushed.revision,
        "files": len(pushed.sent),
        "bytes": sum(one.bytes for one in pushed.sent),
        "removed": list(pushed.removed),
    }


def _after(uploads: Sequence[Upload], pushed: Pushed) -> list[str]:
    told = []
    if len(pushed.sent) < len(uploads):
        told.append(f"{CARD}: the repository has one, which stays; --card FILE replaces it")
    if pushed.removed:
        told.append(
            f"removed in the same commit, as the new weights replace it: {some(list(pushed.removed))}"
        )
    return told


def _message(written: Mapping[str, Any] | None) -> str:
    return f"Output of fishertool {written['command']}" if written else "Upload with fishertool"
