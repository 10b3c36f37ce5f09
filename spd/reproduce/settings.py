"""What a reproduction is made with. The defaults are the published settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from spd.config import (
    CalibrationSettings,
    EvaluationSettings,
    GenerationSettings,
    InterventionSettings,
    RunConfig,
    Section,
    parse_section,
)
from spd.distillation import Recipe
from spd.errors import InputError, near
from spd.files import read_toml
from spd.reproduce.tables import PAPER, PROVING_GROUND, Domain

MINIATURE = Path(__file__).with_name("miniature.toml")
SUITES = {"paper": PAPER, "proving-ground": PROVING_GROUND}


class DiagnosticsSettings(Section):
    """How many completions the distribution shift is taken over, and how many neutral texts; 0 leaves it out."""

    completions: int = Field(default=50, ge=0)
    texts: int = Field(default=100, ge=0)

    @field_validator("texts")
    @classmethod
    def _interval(cls, texts: int) -> int:
        if texts == 1:
            raise ValueError("expected 0, or at least 2 for an interval, got 1")
        return texts


class ReproduceSettings(Section):
    """A reproduction.

    Args:
        model: checkpoint folder, hub name, or "proving-ground".
        suite: "paper" (MBPP, GSM8K, MMLU and their neighbours) or "proving-ground" (the carried capabilities).
        domains: which of the suite's.
        prompts: how questions are asked, as in a run.
        data: folder of local records; without it data sets come from the hub.
        neutral: file of plain text, one passage between blank lines, for perplexity off target; without it the
            proving ground's filler is used.
        seeds: of sampling, training and random subspaces; each is a repetition.
        dtype, device: as in a run.
        calibration, intervention, generation, training, evaluation: as in a run.
        diagnostics: how much is diagnosed.
    """

    model: str
    suite: Literal["paper", "proving-ground"] = "paper"
    domains: list[Literal["code", "math", "choice"]] = Field(default=["code", "math", "choice"], min_length=1)
    prompts: Literal["plain", "chat", "harness"] = "plain"
    data: str | None = None
    neutral: str | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[42, 43, 44], min_length=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    calibration: CalibrationSettings = CalibrationSettings()
    intervention: InterventionSettings = InterventionSettings()
    generation: GenerationSettings = GenerationSettings()
    training: Recipe = Recipe()
    evaluation: EvaluationSettings = EvaluationSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()

    @property
    def suite_domains(self) -> tuple[Domain, ...]:
        return tuple(domain for domain in SUITES[self.suite] if domain.name in self.domains)

    def run_config(self, seed: int) -> RunConfig:
        """The configuration of one seed's stages."""
        shared = {name: getattr(self, name) for name in _SHARED}
        training = {name: getattr(self.training, name) for name in Recipe.__dataclass_fields__} | {"seed": seed}
        capabilities = [domain.capability for domain in self.suite_domains]
        return RunConfig(**shared, tasks=capabilities, seed=seed, training=training)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


_SHARED = ("model", "prompts", "data", "dtype", "device", "calibration", "intervention", "generation", "evaluation")


def parse_settings(values: dict[str, Any], source: str = "settings") -> ReproduceSettings:
    """Raises InputError that names the key, with the near one where it is unknown."""
    seeds = values.get("seeds")
    if isinstance(seeds, list) and len(set(map(str, seeds))) != len(seeds):
        raise InputError(f"{source}: seeds: {seeds} names a seed twice")
    training = values.get("training")
    if isinstance(training, dict):
        known = Recipe.__dataclass_fields__
        if unknown := [key for key in training if key not in known]:
            raise InputError(f"{source}: unknown key {'training.' + unknown[0]!r}{near(unknown[0], known)}")
        try:
            values = values | {"training": Recipe(**training)}
        except InputError as error:
            raise InputError(f"{source}: training.{error}") from None
    return parse_section(ReproduceSettings, values, source)


def load_settings(path: Path | None, given: dict[str, Any], seeds: int | None = None) -> ReproduceSettings:
    """Settings from a TOML file, if there is one, with what was given besides.

    Args:
        path: the file.
        given: values by key ("generation.prompts"), those that are None left out.
        seeds: how many repetitions: the file's seeds from the first on, then numbers that follow (None: the file's).

    Raises:
        InputError: no such file, not TOML, or what `parse_settings` refuses.
    """
    values: dict[str, Any] = read_toml(path) if path else {}
    for key, value in given.items():
        if value is not None:
            *section, name = key.split(".")
            (values.setdefault(section[0], {}) if section else values)[name] = value
    listed = values.get("seeds", ReproduceSettings.model_fields["seeds"].default)
    if seeds is not None and isinstance(listed, list) and listed and all(isinstance(seed, int) for seed in listed):
        values["seeds"] = (listed + [max(listed) + 1 + more for more in range(seeds)])[:seeds]
    return parse_settings(values, path.name if path else "settings")
