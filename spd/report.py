"""One self-contained HTML page for a run folder: scores, spectra, text before and after, timings, settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from spd import plots
from spd.arms import parse_arm
from spd.errors import InputError
from spd.files import read_json, read_jsonl, write_text
from spd.profile import PROFILE, profile_rows
from spd.shown import visible
from spd.spectrum import site_rows
from spd.subspace import Subspace

SAMPLES = 4


@dataclass(frozen=True)
class Sample:
    """One test question as the base model and an arm answer it."""

    task: str
    arm: str
    prompt: str
    base: str
    base_correct: bool | None
    tuned: str
    tuned_correct: bool | None


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder whose `metrics.json` is there; returns its path.

    Raises:
        InputError: a file in the folder is not as a run writes it.
    """
    folder = Path(folder)
    try:
        page = _page(folder)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, UndefinedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: no report, a file in it is not as a run writes it ({error!r})") from error
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _page(folder: Path) -> str:
    config, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    names = list(dict.fromkeys(score["capability"] for score in metrics if score["capability"]))
    capabilities = [_capability(folder, name) for name in names]
    return (
        page_environment()
        .get_template("report.html")
        .render(
            config=config,
            environments=read_json(folder / "environment.json"),
            timings=read_json(folder / "timings.json"),
            profile=profile_rows(read_json(folder / PROFILE)) if (folder / PROFILE).is_file() else [],
            table=score_table(metrics),
            tests=list(dict.fromkeys(score["task"] for score in metrics)),
            arms={name: parse_arm(name).meaning for name in config["arms"]},
            bars=plots.accuracy_bars(metrics) if plots.accuracy_groups(metrics) else "",
            capabilities=capabilities,
            samples=_samples(folder, names, config["arms"], metrics),
        )
    )


def page_environment() -> Environment:
    """Templates of the package's pages: what is put into them is escaped unless marked safe, its controls shown."""
    environment = Environment(
        loader=PackageLoader("spd", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["value"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    return environment


def score_table(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each arm of each capability, its scores by test task: [{capability, arm, scores}]."""
    rows: dict[tuple[str | None, str], dict[str, Any]] = {}
    for score in metrics:
        row = rows.setdefault(
            (score["capability"], score["arm"]), {"capability": score["capability"], "arm": score["arm"], "scores": {}}
        )
        row["scores"][score["task"]] = score
    return list(rows.values())


def _capability(folder: Path, name: str) -> dict[str, Any]:
    where = folder / name
    subspace = Subspace.from_pretrained(where / "subspace") if (where / "subspace").is_dir() else None
    found = {path.parent.name: read_json(path) for path in sorted((where / "adapters").glob("*/training.json"))}
    names = sorted(found, key=lambda name: (name not in _ARM_OF, name))
    training = {_ARM_OF.get(name, name): found[name] for name in names}
    prompts = where / "prompts.json"
    return {
        "name": name,
        "subspace": subspace,
        "spectra": plots.spectra(subspace) if subspace else "",
        "loss": plots.training_loss({arm: manifest["loss"] for arm, manifest in training.items()}) if training else "",
        "training": training,
        "prompts": read_json(prompts) if prompts.is_file() else {"prompts": 0, "too_long": []},
        "sites": site_rows(subspace) if subspace else [],
    }


_ARM_OF = {"plain": "self-training", "projected": "spd"}
"""Adapters that are called after what they were trained on, and the arms they are."""


def _samples(folder: Path, capabilities: list[str], arms: list[str], metrics: list[dict[str, Any]]) -> list[Sample]:
    """Questions whose outcome an arm changed, gains and losses in turn, then unchanged ones; a few a capability."""
    if not capabilities:
        return []
    arm = "spd" if "spd" in arms else arms[-1]
    samples = []
    for name in capabilities:
        tested = [score["task"] for score in metrics if score["capability"] == name]
        task = name if name in tested else tested[0]
        base = read_jsonl(folder / "base" / "evaluations" / f"{task}.scored.jsonl")
        tuned = read_jsonl(folder / name / "evaluations" / parse_arm(arm).slug / f"{task}.scored.jsonl")
        pairs = [
            Sample(task, arm, b["prompt"], b["completion"], b["correct"], t["completion"], t["correct"])
            for b, t in zip(base, tuned, strict=True)
        ]
        gains = [pair for pair in pairs if bool(pair.tuned_correct) > bool(pair.base_correct)]
        losses = [pair for pair in pairs if bool(pair.tuned_correct) < bool(pair.base_correct)]
        unchanged = [pair for pair in pairs if bool(pair.tuned_correct) == bool(pair.base_correct)]
        samples += [*gains[:2], *losses[:1], *unchanged][:SAMPLES]
    return samples
