"""`fishertool estimate-fisher --from-optimizer`: Adam's second moments -> Fisher sidecar."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fishertool import hub
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, staged
from fishertool.errors import UsageError
from fishertool.estimation.forecast import bytes_of, forecast
from fishertool.estimation.output import write_kinds
from fishertool.estimation.settings import WITH_TRACES, Settings, check_settings
from fishertool.fisher.gradients import rows_of
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.kinds import Gathering
from fishertool.fisher.sums import absorb, flattened
from fishertool.models.architectures import task_name
from fishertool.models.loading import load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.optimizer_state import check_is_there, second_moments
from fishertool.models.sentence import transformer_folder
from fishertool.models.tasks import TASKS
from fishertool.report import Files, Report, data_files, environment, options_of, public_name
from fishertool.selection import select

ESTIMATOR = "adam"


def fisher_from_optimizer(
    model: str,
    optimizer: Path,
    out: Path,
    *,
    kind: str = "diagonal",
    task: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    threads: int = 1,
) -> Report:
    """Take an optimizer's running mean of squared gradients for a Fisher; no data are read.

    These are gradients of batches in training, so the estimate is of another scale than the
    exact one and biased (its header says `adam`); its order of weights is what it is good for
    (Li et al. 2025, arXiv 2509.11167).
    """
    report = Report(
        "estimate-fisher", options_of(locals()), environment=environment(threads, "cpu")
    )
    settings = Settings(kind=kind)
    check_settings(settings)
    if other := [one for one in settings.kinds if one not in WITH_TRACES]:
        raise UsageError(
            f"--from-optimizer gives a diagonal or factored Fisher, not {', '.join(other)}"
        )
    check_is_there(optimizer)
    torch.set_num_threads(threads)
    folder = transformer_folder(hub.resolve(model))
    with open_checkpoint(folder) as checkpoint:
        chosen = TASKS[task_name(checkpoint.config(), checkpoint.folder, task)]
        wanted = select(checkpoint, include, exclude)
        infos = [checkpoint.info(name) for name in wanted]
        needed = bytes_of(settings, infos, None)
        check_output(out, [checkpoint.folder], overwrite, sum(needed.values()))
        if dry_run:
            return forecast(report, checkpoint, infos, needed, out)
        with report.phase("open"):
            loaded = load_model(checkpoint, chosen, "cpu", trust_remote_code)
            named, _ = parameters_by_disk_name(loaded.pretrained, checkpoint)
            parameters = {name: named[name] for name in wanted if name in named}
            moments = second_moments(optimizer, loaded.pretrained, parameters)
        header = FisherHeader(
            kind="",
            labels="empirical",
            task=chosen.name,
            model=public_name(model),
            fingerprint=checkpoint.fingerprint(),
            examples=0,
            tokens=0,
            token_ids_sha256="",
            seed=0,
            unit="batch",
            estimator=ESTIMATOR,
        )
        with staged(out, overwrite) as place, report.phase("write"):
            gathering = Gathering(["diagonal", *settings.kinds], parameters)
            sums = {name: value.reshape(rows_of(value)) for name, value in moments.items()}
            absorb(gathering.groups, flattened({"diagonal": sums}))
            stored = gathering.stored(1)
            stored = {kind: stored[kind] for kind in settings.kinds}
            shapes = {name: list(value.shape) for name, value in moments.items()}
            size = parse_size(max_shard_size)
            write_kinds(place, header, shapes, wanted, stored, size, report)
            statistics = next(iter(stored.values())).statistics.values()
            report.inputs.append(Files.of(public_name(model), "model", checkpoint.digests()))
            report.inputs += data_files(str(optimizer))
            report.summary = {
                "kind": ",".join(settings.kinds),
                "estimator": ESTIMATOR,
                "trace": sum(one.total for one in statistics),
                "parameters": sum(value.numel() for value in moments.values()),
                "fingerprint": header.fingerprint,
            }
            (place / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report
