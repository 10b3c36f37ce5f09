"""The stages of an experiment, each made once and kept in a folder: subspaces, completions, adapters, evaluations.

FOLDER/
  base/evaluations/TASK.jsonl                 the model as it came
  CAPABILITY/prompts.json                     which training prompts the model has no room for
  CAPABILITY/subspace/, subspaces/OPTIONS/    spd.calibrate and its controls
  CAPABILITY/generations/NAME.jsonl           NAME: plain, projected, ssd, or the options of a projection
  CAPABILITY/adapters/NAME/
  CAPABILITY/evaluations/ARM/TASK.jsonl
  timings.json, profile.json

Arms share what they have in common, because it has the same name. Whatever is there already is not made again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spd import controls, distributed
from spd.arms import Arm, Projection
from spd.calibration import DETERMINISTIC_BATCH, calibrate
from spd.config import InterventionSettings, RunConfig
from spd.distillation import WEIGHTS, adapted, distill, merged
from spd.errors import InputError
from spd.evaluation import Evaluation, evaluate
from spd.example import Example
from spd.files import json_text, read_json, read_object, sha256, sha256_of_file, write_json
from spd.generation import Generation, generate, leave_out
from spd.intervention import Attachment, attach
from spd.profile import PROFILE, Profile
from spd.subspace import MANIFEST, Subspace
from spd.tasks import Task, load_task

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """One cell of the result: an arm trained for one capability (None for the base), tested on one task."""

    capability: str | None
    arm: str
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        return {"capability": self.capability, "arm": self.arm, **self.evaluation.to_dict()}


class Stages:
    """The stages of one model under one configuration.

    Args:
        config: settings of every stage.
        folder: where results go.
        model: the original model, which is left as it is.
        tokenizer: its tokenizer.
        shared: folder for what does not depend on the seed, shared with other seeds (default: `folder`).
        timings: file for the seconds of every kind of stage (default: `timings.json` in `folder`).
        run_generated_code: see `spd.evaluate`.
        profile: keep tokens, memory and bounds of every stage in `profile.json`.
        progress: show progress bars.
        say: receives one line for every stage that begins.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shared: Path | None = None,
        timings: Path | None = None,
        run_generated_code: bool = False,
        profile: bool = False,
        progress: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.shared = shared or folder
        self.timings = timings or folder / "timings.json"
        self.model = model
        self.tokenizer = tokenizer
        self.run_generated_code = run_generated_code
        self.profile = Profile(model, folder / PROFILE) if profile and distributed.is_main() else None
        self.progress = progress
        self.say = say
        self._tasks: dict[str, Task] = {}
        self.adapter = cache(self._adapter)
        self.training_prompts = cache(self._training_prompts)

    def task(self, name: str) -> Task:
        """A task by the name it was asked for, or by its own, which its folder has."""
        if name not in self._tasks:
            task = load_task(name, self.config.data, prompts=self.config.prompts, tokenizer=self.tokenizer)
            if task.name in self._tasks:
                raise InputError(f"task: {name} is called {task.name}, and so is another task of this run")
            self._tasks |= {name: task, task.name: task}
        return self._tasks[name]

    def evaluate(self, capability: str | None, arm: Arm, tests: Sequence[str]) -> list[Score]:
        """Test an arm, after making whatever of it is missing. The base belongs to no capability."""
        if capability is None:
            return self._evaluate(None, arm, tests, self.model, "")
        if not arm.trained:
            assert arm.projection is not None
            with self.attached(capability, arm.projection):
                return self._evaluate(
                    capability, arm, tests, self.model, self._subspace_tag(capability, arm.projection)
                )
        with self.tuned(capability, arm) as model:
            weights = self.adapter(capability, arm, arm.rounds) / WEIGHTS
            tag = distributed.on_main(lambda: f"adapter {sha256_of_file(weights)}")
            return self._evaluate(capability, arm, tests, model, tag)

    @contextmanager
    def tuned(self, capability: str, arm: Arm) -> Iterator[nn.Module]:
        """The model that a trained arm ends with, inside the block."""
        adapter = self.adapter(capability, arm, arm.rounds)
        with self.started(capability, arm, arm.rounds), adapted(self.model, adapter) as model:
            yield model

    @contextmanager
    def started(self, capability: str, arm: Arm, round: int) -> Iterator[None]:
        """Inside the block the model is what a round starts from: it has all earlier rounds in its weights."""
        adapters = [self.adapter(capability, arm, earlier) for earlier in range(1, round)]
        with ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(merged(self.model, adapter))
            yield

    def subspace(self, capability: str, projection: Projection, origin: str = "") -> Subspace:
        """The subspace of a projection. With an `origin`, of that further round's model: then only inside `started`."""
        capability, projection = self._own(capability, projection, origin)
        folder = self.subspace_folder(capability, projection, origin)
        if made := distributed.on_main(lambda: self._found_subspace(folder)):
            return made
        bare = replace(projection, sides=None)
        beside = [self.subspace(capability, other, origin) for other in _made_from(bare)]  # stages of their own
        with self.stage("calibrate", ", ".join(filter(None, (capability, bare.slug, origin)))):
            made = distributed.broadcast(self._make_subspace(capability, bare, beside))  # the very same in all
            distributed.on_main(lambda: made.save_pretrained(folder))
        return made

    def _found_subspace(self, folder: Path) -> Subspace | None:
        return Subspace.from_pretrained(folder, self.model) if (folder / MANIFEST).is_file() else None

    def subspace_folder(self, capability: str, projection: Projection, origin: str = "") -> Path:
        capability, projection = self._own(capability, projection, origin)
        return subspace_path(self._root(projection, origin) / capability, projection, origin)

    def _own(self, capability: str, projection: Projection, origin: str) -> tuple[str, Projection]:
        """A subspace taken from another task is that task's own, unless a further round's model makes it."""
        if projection.source and not origin:
            return self.task(projection.source).name, replace(projection, source=None)
        return capability, projection

    @staticmethod
    def origin(arm: Arm, round: int) -> str:
        """Which trained model a round starts from, as the end of a file name; "" for the original."""
        return f".after-{_trained(arm, round - 1)}" if round > 1 else ""

    def generations(self, capability: str, arm: Arm, round: int = 1) -> list[Generation]:
        """What the model writes in a round of an arm; of a further round, only inside `started`."""
        settings, name = self.config.generation, _written(arm, round)
        sampling = arm.sampling or settings
        projection, origin = arm.projection, self.origin(arm, round)
        out = self.folder / capability / "generations" / f"{name}.jsonl"
        with (
            self.attached(capability, projection, origin) if projection else nullcontext(),
            self.stage("generate", f"{capability}, {name}"),
            self._counted(out),
        ):
            return generate(
                self.model,
                self.tokenizer,
                self.training_prompts(capability),
                out=out,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_new_tokens=settings.max_new_tokens or self.task(capability).max_new_tokens,
                batch_size=settings.batch_size,
                seed=_seed(self.config.seed, round),
                deterministic=self.config.deterministic,
                tag=self._subspace_tag(capability, projection, origin) if projection else "",
                progress=self.progress,
            )

    def _adapter(self, capability: str, arm: Arm, round: int) -> Path:
        """The adapter that a round of an arm ends with."""
        recipe, name = self.config.training, _trained(arm, round)
        recipe = replace(
            recipe, seed=_seed(recipe.seed, round), learning_rate=arm.learning_rate or recipe.learning_rate
        )
        with self.started(capability, arm, round):
            generations = self.generations(capability, arm, round)
            out = self.folder / capability / "adapters" / name
            with (
                self.stage("distill", f"{capability}, {name}"),
                self.profile.training(out) if self.profile else nullcontext(),
            ):
                return distill(
                    self.model,
                    self.tokenizer,
                    generations,
                    out=out,
                    recipe=recipe,
                    gradient_checkpointing=self.config.gradient_checkpointing,
                    deterministic=self.config.deterministic,
                    progress=self.progress,
                )

    def attached(self, capability: str, projection: Projection, origin: str = "") -> Attachment:
        subspace = self.subspace(capability, projection, origin)
        return attach(self.model, subspace, **self._intervention(projection).model_dump())

    def evaluation_file(self, capability: str | None, arm: Arm, test: str) -> Path:
        """Where `evaluate` leaves the answers; the scored ones are beside it."""
        if capability is None:
            return self.shared / "base" / "evaluations" / f"{test}.jsonl"
        root = self.folder if arm.trained or arm.projection is None else self._root(arm.projection)
        return root / capability / "evaluations" / arm.slug / f"{test}.jsonl"

    @contextmanager
    def stage(self, kind: str, what: str) -> Iterator[None]:
        """Say what begins, and add its seconds to `timings.json`, whose sums run over the sittings of a resumed run.

        What a sitting that is killed had spent in its last stage is not in them.
        """
        if not distributed.is_main():
            yield
            return
        self.say(f"{kind}: {what}")
        start = time.perf_counter()
        try:
            with self.profile.stage(kind, what) if self.profile else nullcontext():
                yield
        finally:
            timings = _timings(self.timings)
            timings[kind] = timings.get(kind, 0.0) + time.perf_counter() - start
            write_json(self.timings, timings)

    def _counted(self, completions: Path) -> AbstractContextManager[None]:
        """Puts what a file of completions gains inside the block into the profile."""
        return self.profile.completions(completions, self.tokenizer) if self.profile else nullcontext()

    def _training_prompts(self, capability: str) -> list[str]:
        task, settings = self.task(capability), self.config.generation
        prompts = task.training_prompts()[: settings.prompts]
        room = settings.max_new_tokens or task.max_new_tokens
        kept, dropped = leave_out(self.model, self.tokenizer, prompts, room, capability)
        counted = {"prompts": len(prompts), "too_long": dropped}
        distributed.on_main(lambda: write_json(self.folder / capability / "prompts.json", counted))
        return kept

    def _make_subspace(self, capability: str, projection: Projection, beside: list[Subspace]) -> Subspace:
        """`beside` are the subspaces of `_made_from`."""
        settings, kind = self.config.calibration, projection.subspace
        if kind == "gradient" and projection.rank not in (None, "full"):
            assert projection.rank is not None
            return beside[0].truncate(projection.rank)
        if kind == "random":
            return controls.random_subspace(beside[0], self.config.seed)
        if kind == "bottom":
            return controls.bottom_subspace(beside[1], beside[0])
        task = self.task(projection.source or capability)
        examples = task.calibration()[: projection.examples or settings.examples or task.calibration_size]
        if kind == "gradient":
            return self._calibrate(examples, projection)
        if kind == "shuffled":
            return self._calibrate(controls.shuffled_labels(examples, self.config.seed, exchange="spans"), projection)
        return _by_one(
            lambda: controls.activation_subspace(
                self.model,
                self.tokenizer,
                examples,
                beside[0],
                batch_size=DETERMINISTIC_BATCH if self.config.deterministic else settings.batch_size,
                max_length=settings.max_length,
                progress=self.progress,
            )
        )

    def _calibrate(self, examples: list[Example], projection: Projection) -> Subspace:
        settings = self.config.calibration
        layers = projection.layers or settings.layers

        def made() -> Subspace:
            return calibrate(
                self.model,
                self.tokenizer,
                examples,
                layers=list(layers) if isinstance(layers, tuple) else layers,
                rank=projection.rank or settings.rank,
                loss=projection.loss or settings.loss,
                center=settings.center,
                batch_size=settings.batch_size,
                max_length=settings.max_length,
                gradient_checkpointing=self.config.gradient_checkpointing,
                deterministic=self.config.deterministic,
                progress=self.progress,
            )

        found = _by_one(made) if self.config.deterministic else made()
        if self.profile:
            self.profile.count_calibration(found)
        return found

    def _evaluate(
        self, capability: str | None, arm: Arm, tests: Sequence[str], model: nn.Module, tag: str
    ) -> list[Score]:
        settings, scores = self.config.evaluation, []
        with self.stage("evaluate", f"{capability}, {arm.name}" if capability else arm.name):
            for test in tests:
                out = self.evaluation_file(capability, arm, test)
                with self._counted(out):
                    evaluation = evaluate(
                        model,
                        self.tokenizer,
                        self.task(test),
                        limit=settings.questions,
                        out=out,
                        max_new_tokens=settings.max_new_tokens,
                        batch_size=settings.batch_size,
                        answer_by="likelihood" if test in settings.by_likelihood else "generation",
                        deterministic=self.config.deterministic,
                        tag=tag,
                        run_generated_code=self.run_generated_code,
                        progress=self.progress,
                    )
                if capability is not None and arm.trained:
                    self._check_unseen(capability, evaluation)
                scores.append(Score(capability, arm.name, evaluation))
        return scores

    def _check_unseen(self, capability: str, evaluation: Evaluation) -> None:
        seen = set(self.training_prompts(capability))
        met = sum(answer.prompt in seen for answer in evaluation.answers)
        if met:
            warnings.warn(
                f"evaluate: {met} of the {len(evaluation.answers)} questions of {evaluation.task} are training prompts "
                f"of {capability}",
                stacklevel=2,
            )

    def _root(self, projection: Projection, origin: str = "") -> Path:
        return self.folder if projection.drawn or origin else self.shared

    def _intervention(self, projection: Projection) -> InterventionSettings:
        settings = self.config.intervention
        return settings.model_copy(update={"sides": projection.sides}) if projection.sides else settings

    def _subspace_tag(self, capability: str, projection: Projection, origin: str = "") -> str:
        path = self.subspace_folder(capability, projection, origin) / MANIFEST
        manifest = distributed.on_main(lambda: sha256(json_text(read_json(path))))  # what it says, not its bytes
        return f"subspace {manifest}, {self._intervention(projection).model_dump_json()}"


def _by_one(work: Callable[[], T]) -> T:
    """Of several processes one does it for all: it cannot be shared, or its bytes are not to depend on how many."""

    def alone() -> T:
        with distributed.apart():
            return work()

    return distributed.on_main(alone)


def subspace_path(folder: Path, projection: Projection, origin: str = "") -> Path:
    """Where a subspace lies below its capability's folder."""
    slug = replace(projection, sides=None).slug
    return folder / "subspaces" / ((slug or "gradient") + origin) if slug or origin else folder / "subspace"


def _timings(path: Path) -> dict[str, float]:
    """For information alone, so what is damaged counts for nothing."""
    try:
        found = read_object(path) if path.exists() else {}
    except InputError:
        return {}
    return {kind: seconds for kind, seconds in found.items() if isinstance(seconds, (int, float))}


def _made_from(projection: Projection) -> list[Projection]:
    """The projections whose subspaces another's is made from or stands beside."""
    gradient = replace(projection, subspace="gradient")
    full = replace(gradient, rank="full")
    if projection.subspace == "gradient":
        return [full] if projection.rank not in (None, "full") else []
    return {"random": [gradient], "activations": [gradient], "bottom": [gradient, full], "shuffled": []}[
        projection.subspace
    ]


def _seed(seed: int, round: int) -> int:
    """Each round draws anew: an almost unchanged model would else write almost the same."""
    return seed if round == 1 else int(np.random.default_rng([seed, round]).integers(2**31))


def _completions(arm: Arm) -> str:
    """What an arm's model writes in its first round, by a name that arms share which write the same."""
    if arm.projection is None:
        return arm.name.partition(":")[0] if arm.sampling else "plain"
    return arm.projection.slug or "projected"


def _trained(arm: Arm, round: int) -> str:
    rate = f",lr={arm.learning_rate:g}" if arm.learning_rate else ""
    return _completions(arm) + rate + (f".round-{round}" if round > 1 else "")


def _written(arm: Arm, round: int) -> str:
    return _completions(arm) if round == 1 else _trained(arm, round)
