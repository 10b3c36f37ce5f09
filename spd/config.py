"""The configuration of a run: a TOML file. Defaults are the published settings where there are any."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spd.arms import DEFAULT_ARMS, parse_arms
from spd.errors import InputError
from spd.files import read_toml
from spd.named import check_rank
from spd.recipe import Recipe

Positive = Field(default=None, ge=1)


class Section(BaseModel):
    """A table of a TOML file: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CalibrationSettings(Section):
    """How many examples (None: the task's published number), and the arguments of `spd.calibrate`."""

    examples: int | None = Positive
    layers: Literal["paper", "middle", "last", "all"] | list[int] = "paper"
    rank: int | str = "half"
    loss: Literal["spans", "full"] = "spans"
    center: bool = True
    batch_size: int = Field(default=8, ge=1)
    max_length: int = Field(default=256, ge=2)

    @field_validator("rank")
    @classmethod
    def _rank(cls, rank: int | str) -> int | str:
        check_rank(rank)
        return rank


class InterventionSettings(Section):
    """The arguments of `spd.attach`."""

    mode: Literal["auto", "hook", "fold", "latent_v", "latent"] = "auto"
    sides: Literal["kv", "k", "v"] = "kv"
    a: float = Field(default=0.0, allow_inf_nan=False)
    b: float = Field(default=1.0, allow_inf_nan=False)


class GenerationSettings(Section):
    """How many training prompts (None: all of the task's), and the arguments of `spd.generate`."""

    prompts: int | None = Positive
    temperature: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    top_k: int | None = Positive
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_new_tokens: int | None = Positive
    batch_size: int = Field(default=32, ge=1)


class EvaluationSettings(Section):
    """How many test questions (None: the task's published number), and the arguments of `spd.evaluate`.

    `by_likelihood` names the tasks that are answered so: of a question's options the likeliest, rather than what is
    written.
    """

    questions: int | None = Positive
    max_new_tokens: int | None = Positive
    batch_size: int = Field(default=32, ge=1)
    by_likelihood: list[str] = []


class RunConfig(Section):
    """One run.

    Args:
        model: checkpoint folder, hub name, or "proving-ground" for the model that the project carries.
        tasks: capabilities to improve, each calibrated and trained for itself.
        evaluate: tasks to test every arm on (default: `tasks`).
        prompts: "plain"; "chat", inside the tokenizer's chat template; or "harness", as lm-evaluation-harness asks.
        arms: what to compare, in the words of `spd.arms`; the base is always among them.
        data: folder of local records, NAME/SPLIT.jsonl; without it data sets come from the hub.
        dtype: of the weights; "auto" takes the checkpoint's on a GPU and float32 on the CPU.
        device: "auto" takes a GPU where there is one.
        seed: of sampling and training.
        gradient_checkpointing: compute activations again rather than keep them, in calibration and training: slower,
            in less memory, the same results.
        deterministic: the same seeds give the same bytes whatever the batch size and the number of processes, where
            that can be had (see `spd.generate`).
    """

    model: str
    tasks: list[str] = Field(min_length=1)
    evaluate: list[str] = []
    arms: list[str] = Field(default=list(DEFAULT_ARMS), min_length=1)
    prompts: Literal["plain", "chat", "harness"] = "plain"
    data: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    seed: int = Field(default=42, ge=0)
    gradient_checkpointing: bool = False
    deterministic: bool = False
    calibration: CalibrationSettings = CalibrationSettings()
    intervention: InterventionSettings = InterventionSettings()
    generation: GenerationSettings = GenerationSettings()
    training: Recipe = Recipe()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, values: dict[str, Any]) -> dict[str, Any]:
        """[training] is a `Recipe`; the seed at the top is its seed unless it has its own."""
        training = values.get("training", {}) if isinstance(values, dict) else None
        if not isinstance(training, dict):
            return values
        for key in training:
            if key not in Recipe.__dataclass_fields__:
                raise InputError(_unknown(key, list(Recipe.__dataclass_fields__), "training."))
        return values | {
            "training": Recipe(**({"seed": values.get("seed", cls.model_fields["seed"].default)} | training))
        }

    @field_validator("tasks", "evaluate")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError(f"a task is named twice in {names}")
        return names

    @field_validator("arms")
    @classmethod
    def _arms(cls, names: list[str]) -> list[str]:
        return [arm.name for arm in parse_arms(names)]

    @property
    def evaluated(self) -> list[str]:
        return self.evaluate or self.tasks

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def load_config(path: str | Path) -> RunConfig:
    """Read a TOML file. Paths in it (model, data) that are relative and exist beside the file are taken from there.

    Raises:
        InputError: no such file, not TOML, an unknown key (the near one is suggested), or a value out of range.
    """
    path = Path(path)
    values = read_toml(path)
    for key in ("model", "data"):
        value = values.get(key)
        if isinstance(value, str) and not os.path.isabs(value) and os.path.isdir(path.parent / value):
            values[key] = str((path.parent / value).resolve())
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str = "config") -> RunConfig:
    return parse_section(RunConfig, values, source)


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(model: type[SectionT], values: dict[str, Any], source: str) -> SectionT:
    """Validate; the first thing wrong becomes one line that names its key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(model, error.errors()[0])}") from None


def _explain(model: type[Section], error: Any) -> str:
    *sections, key = [str(part) for part in error["loc"]] or [""]
    name = ".".join([*sections, key])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        section: Any = model.model_fields[sections[0]].annotation if sections else model
        return _unknown(key, list(section.model_fields), "".join(f"{part}." for part in sections))
    if error["type"] == "missing":
        return f"the key {name!r} is required"
    if error["type"] == "value_error":  # our own words, which say what came
        return f"{name}: {message}" if name else message
    return f"{name}: {message}, got {error['input']!r}"


def _unknown(key: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys there are {', '.join(known)}"
    return f"unknown key {prefix + key!r}; {hint}"
