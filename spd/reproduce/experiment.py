"""One folder of a reproduction: every cell of the tables made once, in parallel processes, resumed where it stopped.

OUT/
  config.json, environment.json
  identity.json              the model's weights and the tasks' records that all of it was made with
  shared/                    what does not depend on the seed, as `spd.stages` keeps it
  seed-N/                    the rest, and CAPABILITY/diagnostics.json
  results.json, tables.md, report.html, figures/
"""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spd.adapters import check_mergeable
from spd.arms import ARMS, Projection, parse_arm
from spd.errors import InputError
from spd.evaluation import Evaluation, check_consent
from spd.files import read_json, read_jsonl, sha256, write_json
from spd.models import load_model, load_tokenizer
from spd.progress import bar
from spd.provenance import weights_fingerprint
from spd.reproduce.diagnose import DIAGNOSTICS, diagnose, joined, neutral_passages
from spd.reproduce.settings import ReproduceSettings, parse_settings
from spd.reproduce.tables import TABLES, Cell, Layout, Table
from spd.run import owned, record_environment
from spd.stages import Stages, subspace_path
from spd.subspace import MANIFEST
from spd.tasks import load_task

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What one process does in one go: cells of one capability under one seed, and what is to be shared before them.

    Args:
        seed: of its stages.
        capability: whose cells; None for the base's.
        cells: what to test.
        subspaces: arms whose subspaces are made ahead, since other jobs take them.
        diagnosed: whether the capability is diagnosed under this seed.
    """

    seed: int
    capability: str | None
    cells: tuple[Cell, ...] = ()
    subspaces: tuple[str, ...] = ()
    diagnosed: bool = False


@dataclass(frozen=True)
class Place:
    """Where a process works and with what."""

    settings: ReproduceSettings
    out: Path
    tests: tuple[str, ...]
    run_generated_code: bool
    progress: bool
    threads: int | None


@dataclass
class _Worker:
    """The model of this process, loaded once."""

    place: Place
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None


def reproduce(
    settings: ReproduceSettings,
    tables: Sequence[str],
    out: str | Path,
    *,
    workers: int = 1,
    run_generated_code: bool = False,
    command: str = "",
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Make the tables, or what is left of them, and write their report.

    Args:
        settings: model, data, seeds and the settings of every stage.
        tables: names out of `TABLES`.
        out: folder; a new one, or one of the same settings. Further tables may be added to it.
        workers: processes, each with a model of its own.
        run_generated_code: see `spd.evaluate`.
        command: what made the folder, for the report.
        progress: show a progress bar.
        say: receives one line for every part that begins.

    Returns:
        The path of the tables in Markdown.

    Raises:
        InputError: an unknown table, a folder of other settings, or of other weights or records where something is
            left to do in it, or what a stage refuses.
    """
    from spd.reproduce.report import write_report

    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise InputError(f"table: there is no {unknown[0]!r}, only {', '.join(TABLES)}")
    if workers < 1:
        raise InputError(f"workers: expected at least 1, got {workers}")
    out = Path(out)
    tests = _tests(settings, tables)
    check_consent([load_task(name, settings.data) for name in tests], run_generated_code)
    _check_prompts(settings, tests)
    if settings.diagnostics.texts:
        neutral_passages(settings)
    layout = layout_of(settings)
    cells = cells_of([TABLES[name] for name in tables], layout)
    with owned(out, settings.as_dict(), lambda stored: parse_settings(stored).as_dict()):
        place = Place(settings, out, tests, run_generated_code, progress and workers == 1, _threads(workers))
        for title, jobs in (
            ("what all seeds share", _shared_jobs(settings, cells)),
            ("every seed", _seed_jobs(settings, cells)),
        ):
            say(title)
            _carry_out(jobs, place, workers, progress)
        earlier = read_json(out / "results.json") if (out / "results.json").is_file() else {"tables": []}
        finished = [name for name in TABLES if name in (*tables, *earlier["tables"])]
        in_them = cells_of([TABLES[name] for name in finished], layout)
        collected = {
            "command": " && ".join(dict.fromkeys([*filter(None, earlier.get("command", "").split(" && ")), command])),
            "settings": settings.as_dict(),
            "layout": {
                "default_examples": dict(layout.default_examples),
                "available_examples": dict(layout.available_examples),
                "learning_rate": layout.learning_rate,
                "rank": layout.rank,
                "layers": layout.layers,
            },
            "tables": finished,
            "cells": [_collected(cell, settings, out) for cell in in_them],
            "diagnostics": _diagnosed(settings, layout, out),
            "prompts": _prompts(settings, out),
        }
        write_json(out / "results.json", collected)
        say("report")
        return write_report(out)


def layout_of(settings: ReproduceSettings) -> Layout:
    """The tables' layout over the settings' domains."""
    tasks = {domain.capability: load_task(domain.capability, settings.data) for domain in settings.suite_domains}
    default = {name: settings.calibration.examples or task.calibration_size for name, task in tasks.items()}
    available = {name: len(task.calibration()) for name, task in tasks.items()}
    rank, layers = settings.calibration.rank, settings.calibration.layers
    return Layout(settings.suite_domains, default, available, settings.training.learning_rate, rank, layers)


def _tests(settings: ReproduceSettings, tables: Iterable[str]) -> tuple[str, ...]:
    """What the tables' columns test, which no records have to be read for."""
    bare = Layout(settings.suite_domains, {}, {})
    return tuple(dict.fromkeys(column.test for name in tables for column in bare.columns(TABLES[name])))


def _check_prompts(settings: ReproduceSettings, tests: Sequence[str]) -> None:
    """Refuse tasks that cannot be asked in the settings' way before any work."""
    if settings.prompts == "plain":
        return
    tokenizer = load_tokenizer(settings.model)[0] if settings.prompts == "chat" else None
    for name in dict.fromkeys([*tests, *(domain.capability for domain in settings.suite_domains)]):
        load_task(name, settings.data, prompts=settings.prompts, tokenizer=tokenizer)


def cells_of(tables: Iterable[Table], layout: Layout) -> list[Cell]:
    """Every cell of the tables, once, and the base beside each."""
    found: dict[Cell, None] = {}
    for table in tables:
        for column in layout.columns(table):
            found[Cell(None, "base", column.test)] = None
            for row in layout.rows(table):
                cell = layout.cell(row, column)
                if cell:
                    found[cell] = None
    return list(found)


def outcome_file(stages_of: Path, shared: Path, cell: Cell) -> Path:
    """Where a cell's outcome lies: below `shared`, if its arm does not depend on the seed."""
    arm = parse_arm(cell.arm)
    root = stages_of if _seeded(cell) else shared
    return root / (cell.capability or "base") / "outcomes" / arm.slug / f"{cell.test}.json"


def shared_subspace(shared: Path, capability: str, projection: Projection) -> Path:
    """Where `spd.stages` keeps a subspace that does not depend on the seed."""
    return subspace_path(shared / (projection.source or capability), replace(projection, source=None))


def _shared_jobs(settings: ReproduceSettings, cells: Sequence[Cell]) -> list[Job]:
    """The base on every test, and the subspaces that several jobs take, each made by one job alone."""
    seed = settings.seeds[0]
    jobs = []
    for domain in settings.suite_domains:
        subspaces = set()
        for cell in cells:
            projection = parse_arm(cell.arm).projection
            if projection and not projection.drawn and domain.capability == (projection.source or cell.capability):
                subspaces.add(cell.arm)
        base = tuple(
            cell
            for cell in cells
            if cell.capability is None and cell.test in (domain.inside, domain.outside, domain.steering)
        )
        jobs.append(Job(seed, domain.capability, base, subspaces=tuple(sorted(subspaces))))
    return jobs


def _seed_jobs(settings: ReproduceSettings, cells: Sequence[Cell]) -> list[Job]:
    """The longest first, so that the last ones to end are short."""
    jobs = []
    for domain in settings.suite_domains:
        mine = [cell for cell in cells if cell.capability == domain.capability]
        for position, seed in enumerate(settings.seeds):
            again = [cell for cell in mine if position == 0 or _seeded(cell)]
            if again:
                jobs.append(Job(seed, domain.capability, tuple(again), diagnosed=position == 0))
    return sorted(jobs, key=lambda job: -len(job.cells))


def _seeded(cell: Cell) -> bool:
    """Whether a cell's outcome depends on the seed."""
    arm = parse_arm(cell.arm)
    return arm.trained or (arm.projection is not None and arm.projection.drawn)


def _carry_out(jobs: Sequence[Job], place: Place, workers: int, progress: bool) -> None:
    """Do the jobs, in this process or in others; the bar counts the outcomes on disk."""
    wanted = {_outcome_of(job, cell, place.out) for job in jobs for cell in job.cells}
    left = (
        not all(path.is_file() for path in wanted)
        or any(_undiagnosed(job, place.out) for job in jobs)
        or any(_without_subspace(job, place.out) for job in jobs)
    )
    if not left:
        return
    if workers == 1:
        worker = _Worker(place)
        for job in jobs:
            _do(worker, job)
        return
    done = sum(path.is_file() for path in wanted)
    context = multiprocessing.get_context("spawn")
    with (
        bar(total=len(wanted), done=done, label="reproduce", unit="cells", show=progress) as shown,
        ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (place,)) as pool,
    ):
        pending: set[Future[None]] = {pool.submit(_do_here, job) for job in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=POLL_SECONDS)
                for future in finished:
                    future.result()
                found = sum(path.is_file() for path in wanted)
                shown.update(found - done)
                done = found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_HERE: list[_Worker] = []


def _start(place: Place) -> None:
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if place.threads:
        torch.set_num_threads(place.threads)
    _HERE.append(_Worker(place))


def _do_here(job: Job) -> None:
    _do(_HERE[0], job)


def _do(worker: _Worker, job: Job) -> None:
    place = worker.place
    stages: Stages | None = None

    def opened() -> Stages:
        nonlocal stages
        if stages is None:
            stages = _stages(worker, job)
        return stages

    for projection in _without_subspace(job, place.out):
        assert job.capability is not None
        opened().subspace(job.capability, projection)
    for cell in job.cells:
        path = _outcome_of(job, cell, place.out)
        if path.is_file():
            continue
        (score,) = opened().evaluate(cell.capability, parse_arm(cell.arm), [cell.test])
        base = opened().evaluation_file(None, ARMS["base"], cell.test).with_suffix(".scored.jsonl")
        write_json(path, _outcome(score.evaluation, read_jsonl(base)))
    if job.diagnosed and job.capability is not None and (arms := _undiagnosed(job, place.out)):
        path = _diagnostics_of(job, place.out)
        found = diagnose(opened(), job.capability, arms, place.settings)
        write_json(path, joined(read_json(path), found) if path.is_file() else found)


def _stages(worker: _Worker, job: Job) -> Stages:
    place = worker.place
    first = worker.loaded is None
    if worker.loaded is None:
        worker.loaded = load_model(place.settings.model, dtype=place.settings.dtype, device=place.settings.device)
        record_environment(place.out, worker.loaded[0])
    if any(parse_arm(cell.arm).rounds > 1 for cell in job.cells):
        check_mergeable(worker.loaded[0])  # now, not after the first round
    folder = place.out / f"seed-{job.seed}"
    stages = Stages(
        place.settings.run_config(job.seed),
        folder,
        *worker.loaded,
        shared=place.out / "shared",
        timings=folder / (job.capability or "base") / "timings.json",
        run_generated_code=place.run_generated_code,
        progress=place.progress,
    )
    if first:
        _check_identity(place, stages)
    return stages


def _check_identity(place: Place, stages: Stages) -> None:
    """Refuse to go on with other weights or records than what is there was made with; keep what these are.

    Further tables may bring tests that the folder does not know yet.
    """
    found = {
        "weights": weights_fingerprint(stages.model),
        "dtype": str(stages.model.dtype).removeprefix("torch."),
        "device": stages.model.device.type,
    }
    for domain in place.settings.suite_domains:
        task = stages.task(domain.capability)
        found[f"calibration of {domain.capability}"] = _hash([example.prompt for example in task.calibration()])
        found[f"training prompts of {domain.capability}"] = _hash(task.training_prompts())
    for name in place.tests:
        questions = [[question.prompt, question.reference] for question in stages.task(name).test()]
        found[f"questions of {name}"] = _hash(questions)
    path = place.out / "identity.json"
    known = read_json(path) if path.is_file() else {}
    if changed := [name for name, value in found.items() if known.get(name, value) != value]:
        raise InputError(
            f"out: {place.out} was begun with other {', '.join(changed)}; expected the same as then, or a new folder"
        )
    write_json(path, known | found)


def _hash(values: Sequence[Any]) -> str:
    return sha256(json.dumps(values, ensure_ascii=False))


def _outcome(evaluation: Evaluation, base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the tables need of an evaluation: a verdict for every question, in order ("-": none)."""
    marks = {True: "1", False: "0", None: "-"}
    completions = [answer.completion for answer in evaluation.answers]
    changed = sum(mine != theirs["completion"] for mine, theirs in zip(completions, base, strict=True))
    return {
        "metric": evaluation.metric,
        "correct": "".join(marks[answer.correct] for answer in evaluation.answers),
        "nll": evaluation.nlls,
        "changed": changed / len(completions),
        "too_long": list(evaluation.too_long),
    }


def _collected(cell: Cell, settings: ReproduceSettings, out: Path) -> dict[str, Any]:
    paths = {seed: outcome_file(out / f"seed-{seed}", out / "shared", cell) for seed in settings.seeds}
    outcomes = {path: read_json(path) for path in dict.fromkeys(paths.values())}
    return asdict(cell) | {"outcomes": list(outcomes.values())}


def _outcome_of(job: Job, cell: Cell, out: Path) -> Path:
    return outcome_file(out / f"seed-{job.seed}", out / "shared", cell)


def _without_subspace(job: Job, out: Path) -> list[Projection]:
    """Projections whose shared subspaces the job is still to make."""
    assert job.capability is not None or not job.subspaces
    projections = [parse_arm(name).projection for name in job.subspaces]
    return [
        projection
        for projection in projections
        if projection and not (shared_subspace(out / "shared", job.capability or "", projection) / MANIFEST).is_file()
    ]


def _undiagnosed(job: Job, out: Path) -> set[str]:
    """Arms that the folder's diagnostics lack. Those that only sweep the learning rate take part in none."""
    if not job.diagnosed:
        return set()
    path = _diagnostics_of(job, out)
    known = set(read_json(path)["arms"]) if path.is_file() else set()
    return {cell.arm for cell in job.cells if not parse_arm(cell.arm).learning_rate} - known


def _diagnostics_of(job: Job, out: Path) -> Path:
    assert job.capability is not None
    return out / f"seed-{job.seed}" / job.capability / DIAGNOSTICS


def _diagnosed(settings: ReproduceSettings, layout: Layout, out: Path) -> dict[str, Any]:
    found = {}
    for domain in layout.domains:
        path = out / f"seed-{settings.seeds[0]}" / domain.capability / DIAGNOSTICS
        if path.is_file():
            found[domain.capability] = read_json(path)
    return found


def _prompts(settings: ReproduceSettings, out: Path) -> dict[str, Any]:
    """By capability, how many training prompts there were and which had no room; the same for every seed."""
    paths = {
        d.capability: out / f"seed-{settings.seeds[0]}" / d.capability / "prompts.json" for d in settings.suite_domains
    }
    return {capability: read_json(path) for capability, path in paths.items() if path.is_file()}


def _threads(workers: int) -> int | None:
    return None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
