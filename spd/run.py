"""The whole method in one folder: calibrate, generate, distill, evaluate four arms, report. Resumes where it stopped.

RUN/
  config.json, environment.json          what was asked for, and where it ran
  base/evaluations/TASK.jsonl            the model as it came
  CAPABILITY/subspace/                   spd.calibrate
  CAPABILITY/generations/{plain,projected}.jsonl
  CAPABILITY/adapters/{plain,projected}/
  CAPABILITY/evaluations/ARM/TASK.jsonl
  metrics.json, timings.json, report.html
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from spd.calibration import calibrate
from spd.config import RunConfig
from spd.distillation import adapted, distill
from spd.errors import InputError
from spd.evaluation import Evaluation, evaluate
from spd.files import read_json, sha256_of_file, write_json
from spd.generation import Generation, generate
from spd.intervention import Attachment, attach
from spd.models import load_model
from spd.provenance import versions
from spd.report import write_report
from spd.subspace import MANIFEST, Subspace
from spd.tasks import Task, load_task

_WITHOUT_EFFECT = {"device", "calibration.batch_size", "generation.batch_size", "evaluation.batch_size"}
"""What a resumed run may change: results depend on these by rounding only."""


@dataclass(frozen=True)
class Score:
    """One cell of the result: an arm trained for one capability (None for the base), tested on one task."""

    capability: str | None
    arm: str
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        return {"capability": self.capability, "arm": self.arm, **self.evaluation.to_dict()}


def run(
    config: RunConfig, folder: str | Path, *, progress: bool = True, say: Callable[[str], None] = lambda line: None
) -> list[Score]:
    """Carry out a run, or what is left of it, and write its report.

    Args:
        config: the run's configuration.
        folder: the run folder; a new one, or one of the same configuration.
        progress: show progress bars.
        say: receives one line for every stage that begins.

    Returns:
        The scores of all arms, as in `metrics.json`.

    Raises:
        InputError: the folder belongs to another configuration or to a run in progress, or a stage refuses its input.
    """
    folder = Path(folder)
    with _owned(folder, config):
        return _Run(config, folder, progress, say).carry_out()


class _Run:
    def __init__(self, config: RunConfig, folder: Path, progress: bool, say: Callable[[str], None]) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.say = say
        self.capabilities = [load_task(name, config.data) for name in config.tasks]
        self.tests = [load_task(name, config.data) for name in config.evaluated]
        with self.stage("load", "the model"):
            self.model, self.tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
        self.record_environment()

    def record_environment(self) -> None:
        """`environment.json` lists the machines and versions of a run's sittings, each different one once, in order."""
        path = self.folder / "environment.json"
        seen = read_json(path) if path.exists() else []
        current = environment(self.model)
        if current not in seen:
            write_json(path, [*seen, current])

    def carry_out(self) -> list[Score]:
        scores = self.evaluate_arm(None, "base", self.model)
        for capability in self.capabilities:
            scores += self.improve(capability)
        write_json(self.folder / "metrics.json", [score.to_dict() for score in scores])
        with self.stage("report", "report.html"):
            write_report(self.folder)
        return scores

    def improve(self, capability: Task) -> list[Score]:
        subspace = self.calibrate(capability)
        plain = self.generate(capability, None)
        projected = self.generate(capability, subspace)
        adapters = {
            "self-training": self.distill(capability, "plain", plain),
            "spd": self.distill(capability, "projected", projected),
        }
        with self.attached(subspace):
            scores = self.evaluate_arm(capability, "projected", self.model, self.subspace_tag(capability))
        for arm, adapter in adapters.items():
            with adapted(self.model, adapter) as tuned:
                tag = f"adapter {sha256_of_file(adapter / 'adapter_model.safetensors')}"
                scores += self.evaluate_arm(capability, arm, tuned, tag)
        return scores

    def calibrate(self, capability: Task) -> Subspace:
        folder = self.folder / capability.name / "subspace"
        if (folder / MANIFEST).is_file():
            return Subspace.from_pretrained(folder, self.model)
        settings = self.config.calibration
        with self.stage("calibrate", capability.name):
            subspace = calibrate(
                self.model,
                self.tokenizer,
                capability.calibration()[: settings.examples or capability.calibration_size],
                progress=self.progress,
                **settings.model_dump(exclude={"examples"}),
            )
            subspace.save_pretrained(folder)
        return subspace

    def generate(self, capability: Task, subspace: Subspace | None) -> list[Generation]:
        settings = self.config.generation
        name = "plain" if subspace is None else "projected"
        with self.stage("generate", f"{capability.name}, {name}"), self.attached(subspace):
            return generate(
                self.model,
                self.tokenizer,
                capability.training_prompts()[: settings.prompts],
                out=self.folder / capability.name / "generations" / f"{name}.jsonl",
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens or capability.max_new_tokens,
                batch_size=settings.batch_size,
                seed=self.config.seed,
                tag="" if subspace is None else self.subspace_tag(capability),
                progress=self.progress,
            )

    def distill(self, capability: Task, name: str, generations: list[Generation]) -> Path:
        with self.stage("distill", f"{capability.name}, {name}"):
            return distill(
                self.model,
                self.tokenizer,
                generations,
                out=self.folder / capability.name / "adapters" / name,
                recipe=self.config.training,
                progress=self.progress,
            )

    def evaluate_arm(self, capability: Task | None, arm: str, model: nn.Module, tag: str = "") -> list[Score]:
        settings = self.config.evaluation
        owner = capability.name if capability else None
        where = self.folder / (owner or "base") / "evaluations" / (arm if owner else "")
        scores = []
        with self.stage("evaluate", f"{owner}, {arm}" if owner else arm):
            for test in self.tests:
                evaluation = evaluate(
                    model,
                    self.tokenizer,
                    test,
                    limit=settings.questions,
                    out=where / f"{test.name}.jsonl",
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=settings.batch_size,
                    tag=tag,
                    progress=self.progress,
                )
                scores.append(Score(owner, arm, evaluation))
        return scores

    def attached(self, subspace: Subspace | None) -> Attachment | nullcontext[None]:
        if subspace is None:
            return nullcontext()
        return attach(self.model, subspace, **self.config.intervention.model_dump())

    def subspace_tag(self, capability: Task) -> str:
        manifest = sha256_of_file(self.folder / capability.name / "subspace" / MANIFEST)
        return f"subspace {manifest}, {self.config.intervention.model_dump_json()}"

    @contextmanager
    def stage(self, kind: str, what: str) -> Iterator[None]:
        """Say what begins, and add its seconds to `timings.json`, whose sums run over the sittings of a resumed run.

        What a sitting that is killed had spent in its last stage is not in them.
        """
        self.say(f"{kind}: {what}")
        start = time.perf_counter()
        try:
            yield
        finally:
            path = self.folder / "timings.json"
            timings = read_json(path) if path.exists() else {}
            timings[kind] = timings.get(kind, 0.0) + time.perf_counter() - start
            write_json(path, timings)


@contextmanager
def _owned(folder: Path, config: RunConfig) -> Iterator[None]:
    """The folder, locked, with this configuration in it."""
    stored = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder: {folder} is not a folder")
    if folder.is_dir() and not stored.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"run folder: {folder} is not empty and holds no run")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for leftover in folder.rglob(".*.tmp"):  # of a sitting that was killed while it wrote
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if stored.exists():
                changed = _differences(read_json(stored), config.as_dict())
                if changed:
                    raise InputError(
                        f"run folder: {folder} belongs to another configuration (different: {', '.join(changed)})"
                    )
            else:
                write_json(stored, config.as_dict())
            yield
    except Timeout:
        raise InputError(f"run folder: {folder} is in use by another run") from None


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _differences(before, after, f"{prefix}{key}.")
        elif before != after and prefix + key not in _WITHOUT_EFFECT:
            changed.append(prefix + key)
    return changed


def environment(model: nn.Module) -> dict[str, Any]:
    """Machine and versions, for the report."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "system": platform.system(),
        "versions": versions(),
    }
