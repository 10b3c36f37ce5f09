"""One self-contained HTML page for a run folder: scores, spectra, text before and after, timings, settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spd import plots
from spd.files import read_json, read_jsonl, write_text
from spd.spectrum import site_rows
from spd.subspace import Subspace

SAMPLES = 4
ARM_MEANING = {
    "base": "the model as it came",
    "projected": "K and V projected while it answers, no training",
    "self-training": "fine-tuned on its own plain completions",
    "spd": "fine-tuned on its own completions under projection",
}
ARMS = tuple(ARM_MEANING)


@dataclass(frozen=True)
class Sample:
    """One test question as the base model and the SPD model answer it."""

    task: str
    prompt: str
    reference: str
    base: str
    base_correct: bool
    spd: str
    spd_correct: bool


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder whose `metrics.json` is there; returns its path."""
    folder = Path(folder)
    config, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    capabilities = [_capability(folder, name) for name in config["tasks"]]
    environment = Environment(
        loader=PackageLoader("spd", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["value"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    page = environment.get_template("report.html").render(
        config=config,
        environments=read_json(folder / "environment.json"),
        timings=read_json(folder / "timings.json"),
        table=score_table(metrics),
        tests=list(dict.fromkeys(score["task"] for score in metrics)),
        arms=ARM_MEANING,
        bars=plots.accuracy_bars(metrics),
        capabilities=capabilities,
        samples=_samples(folder, config, metrics),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


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
    subspace = Subspace.from_pretrained(folder / name / "subspace")
    training = {arm: read_json(folder / name / "adapters" / arm / "training.json") for arm in ("plain", "projected")}
    return {
        "name": name,
        "subspace": subspace,
        "spectra": plots.spectra(subspace),
        "loss": plots.training_loss({arm: manifest["loss"] for arm, manifest in training.items()}),
        "training": training,
        "sites": site_rows(subspace),
    }


def _samples(folder: Path, config: dict[str, Any], metrics: list[dict[str, Any]]) -> list[Sample]:
    """Questions whose outcome SPD changed, gains and losses in turn, then unchanged ones; a few for each capability."""
    samples = []
    for name in config["tasks"]:
        tested = [score["task"] for score in metrics if score["capability"] == name]
        task = name if name in tested else tested[0]
        base = read_jsonl(folder / "base" / "evaluations" / f"{task}.scored.jsonl")
        tuned = read_jsonl(folder / name / "evaluations" / "spd" / f"{task}.scored.jsonl")
        pairs = [
            Sample(task, b["prompt"], b["reference"], b["completion"], b["correct"], t["completion"], t["correct"])
            for b, t in zip(base, tuned, strict=True)
        ]
        gains = [pair for pair in pairs if pair.spd_correct > pair.base_correct]
        losses = [pair for pair in pairs if pair.spd_correct < pair.base_correct]
        unchanged = [pair for pair in pairs if pair.spd_correct == pair.base_correct]
        samples += [*gains[:2], *losses[:1], *unchanged][:SAMPLES]
    return samples
