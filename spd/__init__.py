"""Self-Policy Distillation (arXiv 2605.22675) on transformers and peft.

subspace = spd.calibrate(model, tokenizer, examples)
with spd.attach(model, subspace):
    completions = spd.generate(model, tokenizer, prompts)
spd.distill(model, tokenizer, completions, out="adapter")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spd import version

if TYPE_CHECKING:
    from spd.calibration import calibrate
    from spd.comparison import Comparison
    from spd.distillation import Recipe, adapted, distill
    from spd.errors import InputError
    from spd.evaluation import Evaluation, evaluate
    from spd.example import Example
    from spd.export import export_adapter, export_folded, export_merged
    from spd.generation import Generation, generate
    from spd.intervention.attach import Attachment, attach
    from spd.intervention.latent_cache import cache_bytes
    from spd.intervention.nearest_centroid import NearestCentroid
    from spd.intervention.planner import Plan, Prediction, plan
    from spd.intervention.router import Decision, Router
    from spd.manifest import verify
    from spd.models import load_model
    from spd.recalibration import drift
    from spd.record import signed
    from spd.subspace import Basis, Subspace
    from spd.tasks import Question, Task, load_task

__version__ = version.__version__

_HOME = {
    "Attachment": "spd.intervention.attach",
    "attach": "spd.intervention.attach",
    "cache_bytes": "spd.intervention.latent_cache",
    "Decision": "spd.intervention.router",
    "NearestCentroid": "spd.intervention.nearest_centroid",
    "Router": "spd.intervention.router",
    "calibrate": "spd.calibration",
    "Recipe": "spd.distillation",
    "adapted": "spd.distillation",
    "distill": "spd.distillation",
    "InputError": "spd.errors",
    "Evaluation": "spd.evaluation",
    "evaluate": "spd.evaluation",
    "Example": "spd.example",
    "export_adapter": "spd.export",
    "export_folded": "spd.export",
    "export_merged": "spd.export",
    "Generation": "spd.generation",
    "generate": "spd.generation",
    "load_model": "spd.models",
    "Plan": "spd.intervention.planner",
    "Prediction": "spd.intervention.planner",
    "plan": "spd.intervention.planner",
    "Comparison": "spd.comparison",
    "drift": "spd.recalibration",
    "signed": "spd.record",
    "verify": "spd.manifest",
    "Basis": "spd.subspace",
    "Subspace": "spd.subspace",
    "Question": "spd.tasks",
    "Task": "spd.tasks",
    "load_task": "spd.tasks",
}

__all__ = [
    "Attachment",
    "Basis",
    "Comparison",
    "Decision",
    "Evaluation",
    "Example",
    "Generation",
    "InputError",
    "NearestCentroid",
    "Plan",
    "Prediction",
    "Question",
    "Recipe",
    "Router",
    "Subspace",
    "Task",
    "adapted",
    "attach",
    "cache_bytes",
    "calibrate",
    "distill",
    "drift",
    "evaluate",
    "export_adapter",
    "export_folded",
    "export_merged",
    "generate",
    "load_model",
    "load_task",
    "plan",
    "signed",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use: transformers takes seconds, and `spd --help` needs none of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'spd' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
