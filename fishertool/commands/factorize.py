"""`fishertool factorize`: dense layers -> low-rank pairs."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from fishertool.calibration import CalibrationData, DataOptions, check_data_source
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import Layout, parse_size
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.errors import UsageError, some
from fishertool.factorization.rank import Ranks
from fishertool.models.loading import check_device
from fishertool.progress import Track, silent
from fishertool.registry import FACTORIZATION, find_method, suggest
from fishertool.report import (
    Files,
    Report,
    data_files,
    environment,
    options_of,
    public_name,
)
from fishertool.searching.ranks import OriginalsJudge, best_allocation
from fishertool.surgery.factorize_plan import FORMATS, FactorizePlan, Refined, plan_factorize
from fishertool.surgery.factorize_ranks import Budget
from fishertool.surgery.factorize_recover import Finetuning, recover_factors, training_data
from fishertool.surgery.factorize_report import rows_of, summary_of
from fishertool.surgery.factorize_terms import Cutter, KeptTerms, decompose_all, decomposing
from fishertool.surgery.factorize_write import write_factorized
from fishertool.surgery.output import BASE_RSS_BYTES, checkpoint_output, code_left_out

DOUBLES = 8
"""Matrices of a layer's size that a decomposition holds at once."""
UNMEASURED = (
    "nothing was measured: a small weighted error does not mean a small loss; "
    "--evaluate-on measures both on held-out data"
)
UNFACTORIZED = (
    "nothing was factorized: every selected matrix stays dense, as at its rank factors would have no "
    "fewer parameters; give a smaller budget"
)
UNTRAINED = "nothing was trained: no matrix has factors; --finetune-steps needs a smaller budget"


def factorize(
    model: str,
    out: Path,
    *,
    method: str = "kronecker",
    fisher: str | None = None,
    settings: Mapping[str, Any] | None = None,
    start: str | None = None,
    keep: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    target_parameters: int | None = None,
    allocate: str | None = None,
    rank_multiple: int = 1,
    format: str = "low-rank",  # noqa: A002 (the flag's name)
    finetune: Finetuning | None = None,
    evaluate_on: DataOptions | None = None,
    batch_size: int = 8,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    threads: int = 1,
    device: str = "cpu",
    track: Track = silent,
) -> Report:
    """Write `model` into `out` with a pair of factors in the place of every selected matrix.

    One of `keep`, `rank`, `energy` and `target_parameters` says how much is left. Selected are
    the linear weights inside the blocks, unless `include` says otherwise. With `finetune`, the
    factors are trained before they are measured; the figures of single matrices are of before.
    """
    report = Report("factorize", options_of(locals()), environment=environment(threads, device))
    budget = Budget(keep, rank, energy, target_parameters, allocate, rank_multiple)
    chosen = _resolve(method, settings or {}, start)
    if format not in FORMATS:
        raise UsageError(f"--format {suggest(format, FORMATS)}")
    if allocate == "auto" and evaluate_on is None:
        raise UsageError("--allocate auto needs --evaluate-on, the held-out data to choose by")
    if finetune is not None and format == "dense":
        raise UsageError(
            "--finetune-steps trains factors, which --format dense has not; write them as low-rank, "
            "then `fishertool densify`"
        )
    data = [options for options in (finetune and finetune.data, evaluate_on) if options]
    for options in data:
        check_data_source(options)
    device = report.environment["device"] = check_device(device)
    report.options["set"] = chosen.settings
    if finetune is not None:
        report.options["finetune"] = options_of(vars(finetune))
    with ExitStack() as opened:
        with report.phase("check"):
            plan = plan_factorize(
                opened, model, fisher, chosen, budget, format, include, exclude,
                parse_size(max_shard_size), allow_nonfinite, trust_remote_code,
            )  # fmt: skip
            sidecars = [tensors.folder for tensors, _ in plan.statistics.kinds.values()]
            read = [plan.folders.top, plan.checkpoint.folder, *sidecars]
            needed = _needed_bytes(plan, copies=1 if finetune is None else 2)
            check_output(out, read, overwrite, sum(needed.values()))
        if dry_run:
            return _forecast(report, plan, needed, threads, out)
        judge = None
        torch.set_num_threads(threads)
        opened.enter_context(threadpool_limits(threads, "blas"))
        if evaluate_on is not None:
            judge = OriginalsJudge(plan, evaluate_on, batch_size, device, trust_remote_code)
        texts = finetune and training_data(plan.checkpoint, finetune, trust_remote_code)
        with staged(out, overwrite) as folder:
            place = plan.folders.place(folder)
            ranks, cut, name, tried = _ranks(plan, folder, judge, report, threads, device, track)
            total = sum(tensor.elements for tensor in plan.checkpoint.infos().values())
            with report.phase("write"), track("Writing", total, "weights") as advance:
                layout, digests, figures = write_factorized(
                    plan, ranks, cut, folder, threads, advance
                )
            report.summary = summary_of(plan, ranks) | {"allocate": name}
            report.tensors = rows_of(plan, ranks, figures)
            if not any(ranks.values()):
                report.warnings.append(UNFACTORIZED)
            if indefinite := plan.statistics.indefinite:
                report.warnings.append(
                    f"{len(indefinite)} moments are not positive semi-definite: "
                    f"{some(sorted(indefinite))}; their negative eigenvalues count as zero; estimate "
                    "them again"
                )
            if untold := plan.statistics.untold:
                report.warnings.append(
                    f"no token reached {some([*untold])}: factorized as by svd, and last where a "
                    "budget is shared"
                )
            if isinstance(cut, KeptTerms):
                cut.discard()
            _evaluate(report, place, judge, tried)
            if finetune and texts and plan.low_rank(ranks):
                digests = _finetune(
                    report, place, layout, finetune, texts, judge, device, trust_remote_code, track
                )
            elif finetune:
                report.warnings.append(UNTRAINED)
            with report.phase("digest"):
                report.inputs = _input_files(plan, model, fisher)
            for options in data:
                report.inputs += data_files(options.data)
            report.output = checkpoint_output(layout, digests, plan.folders.of_top, folder, place)
            report.warnings += code_left_out(plan.checkpoint, plan.folders.companions)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _resolve(name: str, given: Mapping[str, Any], start: str | None) -> Refined:
    """The method with all its settings, and where it starts."""
    chosen = find_method(FACTORIZATION, name)
    parsed = chosen.parse(given)
    for setting, value in parsed.items():
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            raise UsageError(f"{name} {setting}: {value} is not a number of at least 0")
    first = None
    if start is not None:
        if "start" not in chosen.inputs:
            raise UsageError(f"--start is for methods that refine another's result, not {name}")
        first = find_method(FACTORIZATION, start)
        if "start" in first.inputs:
            raise UsageError(f"--start {start}: refines another's result itself")
    return Refined(chosen, parsed, first)


def _ranks(
    plan: FactorizePlan,
    folder: Path,
    judge: OriginalsJudge | None,
    report: Report,
    threads: int,
    device: str,
    track: Track,
) -> tuple[Ranks, Cutter, str, dict[str, Any]]:
    """Every matrix's rank, where its factors come from, the allocation, and what was tried."""
    shapes, budget = plan.shapes, plan.budget
    tried: dict[str, Any] = {"candidates": []}
    if not budget.needs_spectra:
        return budget.known(shapes, plan.others), decomposing(plan, device), budget.name, tried
    scratch = folder / "terms"
    scratch.mkdir()
    elements = sum(matrix.elements for matrix in plan.matrices)
    with report.phase("decompose"), track("Decomposing", elements, "weights") as advance:
        spectra = decompose_all(plan, scratch, device, threads, advance)
    cut = KeptTerms(plan, scratch, spectra, device)
    candidates = budget.candidates(spectra, shapes, plan.others)
    name = next(iter(candidates))
    if judge is not None and len(candidates) > 1:
        with report.phase("allocate"), track("Measuring", len(candidates), "models") as advance:
            name, tried = best_allocation(plan, candidates, cut, judge, advance)
    return candidates[name], cut, name, tried


def _finetune(
    report: Report,
    folder: Path,
    layout: Layout,
    how: Finetuning,
    texts: CalibrationData,
    judge: OriginalsJudge | None,
    device: str,
    trust_remote_code: bool,
    track: Track,
) -> list[FileDigest]:
    """Train the factors, and measure again."""
    with report.phase("finetune"), track("Training", how.steps, "steps") as advance:
        digests, recovery = recover_factors(
            folder, layout, how, texts, device, trust_remote_code, advance
        )
    report.summary["recovery"] = asdict(recovery)
    report.warnings += texts.warnings()
    if judge is not None and report.evaluation is not None:
        with report.phase("evaluate"):
            before, after = report.evaluation["metrics"], judge.of_written(folder)
        report.evaluation |= {"metrics": after, "before_recovery": before}
    return digests


def _evaluate(
    report: Report,
    folder: Path,
    judge: OriginalsJudge | None,
    tried: Mapping[str, Any],
) -> None:
    """Measure what was written, or say that nothing was."""
    if judge is None:
        report.warnings.append(UNMEASURED)
        return
    with report.phase("evaluate"):
        metrics = judge.of_written(folder)
        others = judge.of_original()
    report.evaluation = {"metrics": metrics, "against": others, **tried}
    report.calibration = judge.data.describe()
    report.warnings += judge.warnings()


def _needed_bytes(plan: FactorizePlan, copies: int) -> dict[str, int]:
    """At most: the checkpoint again, and the terms of all matrices where ranks follow from them."""
    found = {"output": copies * sum(info.nbytes for info in plan.checkpoint.infos().values())}
    if plan.budget.needs_spectra and not plan.chosen.refines:
        found["terms"] = sum(
            (8 if matrix.dtype == "F64" else 4) * matrix.elements for matrix in plan.matrices
        )
    return found


def _forecast(
    report: Report, plan: FactorizePlan, needed: Mapping[str, int], threads: int, out: Path
) -> Report:
    has_moments = "inputs" in plan.chosen.inputs
    largest = max(
        max(matrix.shape) ** 2 if has_moments else matrix.elements for matrix in plan.matrices
    )
    report.status = "dry-run"
    if not plan.budget.needs_spectra:
        ranks = plan.budget.known(plan.shapes, plan.others)
        report.summary = summary_of(plan, ranks)
        report.tensors = rows_of(plan, ranks, {})
        needed = {"output": plan.layout(ranks).nbytes}
    report.summary |= {
        "selected": len(plan.matrices),
        "bytes_to_write": needed["output"],
        "bytes_of_working_files": sum(needed.values()) - needed["output"],
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": BASE_RSS_BYTES + threads * DOUBLES * 8 * largest,
    }
    return report


def _input_files(plan: FactorizePlan, model: str, fisher: str | None) -> list[Files]:
    found = [Files.of(public_name(model), "model", plan.checkpoint.digests())]
    if fisher is not None:
        kinds = plan.statistics.kinds.values()
        digests = [one for tensors, _ in kinds for one in tensors.digests()]
        found.append(Files.of(public_name(fisher), "fisher", digests))
    return found
