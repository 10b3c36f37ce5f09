"""The whole method in one folder: every arm made and tested, and a report. Resumes where it stopped.

RUN/
  config.json, environment.json          what was asked for, and where it ran
  base/, CAPABILITY/                     the stages, as `spd.stages` keeps them
  metrics.json, timings.json, profile.json, report.html
"""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spd import distributed
from spd.adapters import check_mergeable
from spd.arms import ARMS, parse_arm
from spd.config import RunConfig, parse_config
from spd.determinism import one_thread
from spd.errors import InputError
from spd.evaluation import check_consent
from spd.files import read_json, read_object, write_json
from spd.lock import INSIDE, locked
from spd.models import load_model
from spd.provenance import versions
from spd.report import write_report
from spd.stages import Score, Stages
from spd.tasks import load_task

_WITHOUT_EFFECT = {
    "arms",
    "device",
    "gradient_checkpointing",
    "calibration.batch_size",
    "generation.batch_size",
    "evaluation.batch_size",
}
"""What a resumed run may change: results do not depend on these, or by rounding only."""
_ENVIRONMENT = "environment.json"
_PUT_BACK = (
    "put it back (a new run of the same configuration writes the same), choose another folder or delete this one"
)


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    run_generated_code: bool = False,
    profile: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Score]:
    """Carry out a run, or what is left of it, and write its report. Under torchrun all processes do it together.

    Args:
        config: the run's configuration.
        folder: the run folder; a new one, or one of the same configuration.
        run_generated_code: consent to execute what the model writes, see `spd.evaluate`.
        profile: keep seconds, tokens, memory and bound of every stage in `profile.json`, and show them in the report.
        progress: show progress bars.
        say: receives one line for every stage that begins.

    Returns:
        The scores of all arms, as in `metrics.json`.

    Raises:
        InputError: the folder belongs to another configuration or to a run in progress, or a stage refuses its input.
    """
    distributed.join()
    folder = Path(folder)
    check_consent([load_task(name, config.data) for name in config.evaluated], run_generated_code)
    for arm in map(parse_arm, config.arms):
        if arm.projection and arm.projection.source:
            load_task(arm.projection.source, config.data)  # refused now, not after the arms before it
    with ExitStack() as held:
        distributed.on_main(
            lambda: held.enter_context(owned(folder, config.as_dict(), lambda stored: parse_config(stored).as_dict()))
        )
        say("load: the model")
        model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
        if any(parse_arm(name).rounds > 1 for name in config.arms):
            check_mergeable(model)  # now, not after the first round
        distributed.on_main(lambda: record_environment(folder, model))
        if config.deterministic:
            held.enter_context(one_thread())
        if config.deterministic and distributed.size() > 1:
            warnings.warn(
                f"run: deterministic: {distributed.size()} processes drop out and add up otherwise than one when they "
                "train; completions of the untrained model are the same bytes, trained adapters are not",
                stacklevel=2,
            )
        stages = Stages(
            config,
            folder,
            model,
            tokenizer,
            run_generated_code=run_generated_code,
            profile=profile,
            progress=progress,
            say=say,
        )
        capabilities, tests = ([stages.task(name).name for name in names] for names in (config.tasks, config.evaluated))
        scores = stages.evaluate(None, ARMS["base"], tests)
        for capability in capabilities:
            for arm in map(parse_arm, config.arms):
                if arm.name != "base":
                    scores += stages.evaluate(capability, arm, tests)
        distributed.on_main(lambda: _conclude(stages, scores))
        return scores


def _conclude(stages: Stages, scores: list[Score]) -> None:
    write_json(stages.folder / "metrics.json", [score.to_dict() for score in scores])
    with stages.stage("report", "report.html"):
        write_report(stages.folder)


def record_environment(folder: Path, model: nn.Module) -> None:
    """`environment.json` lists the machines and versions of a folder's sittings, each different one once, in order."""
    path = folder / _ENVIRONMENT
    seen = read_json(path) if path.exists() else []
    if not isinstance(seen, list):
        raise InputError(f"{path}: expected a list of machines; delete it")
    current = environment(model)
    if current not in seen:
        write_json(path, [*seen, current])


@contextmanager
def owned(
    folder: Path, config: dict[str, Any], current: Callable[[dict[str, Any]], dict[str, Any]] = lambda stored: stored
) -> Iterator[None]:
    """The folder, locked, with this configuration in it; `current` brings a stored one up to date."""
    stored = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run folder: {folder} is not a folder")
    if folder.is_dir() and not stored.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        if (folder / _ENVIRONMENT).exists():
            raise InputError(f"{stored}: missing, and it says what everything else here was made with; {_PUT_BACK}")
        raise InputError(f"run folder: {folder} is not empty and holds no run")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*"):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"run folder: {path} leads out of the folder, where a run writes and removes files")
    with locked(folder / INSIDE, "run folder"):
        for leftover in folder.rglob(".*.tmp"):  # of a sitting that was killed while it wrote
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        if stored.exists():
            try:
                changed = _differences(current(read_object(stored)), config)
            except InputError as error:
                said = str(error).removeprefix(f"{stored}: ")
                raise InputError(f"{stored}: not as a run keeps it ({said}); {_PUT_BACK}") from None
            if changed:
                raise InputError(
                    f"run folder: {folder} belongs to another configuration (different: {', '.join(changed)})"
                )
        write_json(stored, config)
        yield


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
