"""Statistics of a model that is loaded already and may have changed since; and its loss."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from fishertool.checkpoint.layout import ONE_FILE
from fishertool.estimation.bank import Bank, members_of, open_bank
from fishertool.estimation.job import divided, job_of, run
from fishertool.estimation.output import finish
from fishertool.estimation.settings import Settings
from fishertool.estimation.subject import LoadedSubject
from fishertool.estimation.worker import Worker
from fishertool.fisher.estimate import estimate
from fishertool.fisher.kinds import Gathering
from fishertool.progress import Advance
from fishertool.report import Report


def write_statistics(
    loaded: LoadedSubject, settings: Settings, folder: Path, advance: Advance
) -> None:
    """A sidecar of the model as it is now, in `folder`, which is there."""
    work = divided(loaded, settings)
    job = job_of(loaded, settings, work)
    bank: Bank | None = None
    with ExitStack() as opened:
        if "rank-one" in settings.kinds:
            members = members_of(work.units, settings.group)
            bank = opened.enter_context(
                open_bank(folder, job, loaded.parameters, members, ONE_FILE)
            )
        gathering = Gathering(settings.kinds, loaded.parameters, bank.statistic if bank else None)
        worker = Worker(job, 0, gathering, bank.members if bank else ())
        run(loaded, settings, worker, work.units, advance)
        writer, report = bank.writer if bank else None, Report("estimate-fisher", {})
        finish(folder, worker, writer, report, shard_bytes=ONE_FILE, check=True)


def loss_of(loaded: LoadedSubject) -> float:
    """Mean of -log p(target) over all that is scored."""
    units = divided(loaded, Settings(batch_size="auto")).units
    probe, longer = loaded.probe, loaded.longer
    return estimate(loaded.module, {}, loaded.batch, units, [], probe=probe, longer=longer).loss


def split(loaded: LoadedSubject, share: float) -> tuple[LoadedSubject, LoadedSubject]:
    """The same model with the examples to calibrate on, and with a share of them held out: drawn by
    the seed of the data, whose order may have a period."""
    examples = loaded.texts.examples
    generator = torch.Generator().manual_seed(loaded.subject.data.seed)
    drawn = torch.randperm(len(examples), generator=generator)[: int(len(examples) * share)]
    held = set(drawn.tolist())
    parts = [
        [example for n, example in enumerate(examples) if (n in held) is wanted]
        for wanted in (False, True)
    ]
    first, second = (replace(loaded, texts=replace(loaded.texts, examples=one)) for one in parts)
    return first, second
