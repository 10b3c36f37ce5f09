"""The proving ground: a small language model of the project's own making, and three capabilities to improve it on.

`TASKS` holds the capabilities with their out-of-domain siblings; `checkpoint()` is a Hugging Face folder with the
model that `python -m spd.proving_ground.build` trained from noise.
"""

from __future__ import annotations

from pathlib import Path

from spd.proving_ground import choice, code, words
from spd.proving_ground.generated import GeneratedTask, Steering

_TASKS: tuple[GeneratedTask, ...] = (
    words.Words("words", words.IN_DOMAIN),
    words.Words("words-ood", words.OUT_OF_DOMAIN),
    choice.Choice("choice", choice.IN_DOMAIN),
    choice.Choice("choice-ood", choice.OUT_OF_DOMAIN),
    code.Code("code", out_of_domain=False, told_share=0.4),
    code.Code("code-ood", out_of_domain=True, told_share=1.0),
)
TASKS: dict[str, GeneratedTask] = {task.name: task for task in _TASKS}
"""Every task by name. Building it is cheap: records are drawn when they are first asked for."""

STEERING: dict[str, Steering] = {
    f"{task.name}-steering": Steering(task) for task in _TASKS if not task.name.endswith("-ood")
}
"""The capabilities once more, tested on the questions that `build` steered its training by."""


def checkpoint() -> Path:
    """The folder of the shipped model and its tokenizer."""
    return Path(__file__).with_name("checkpoint")


def recall_checkpoint() -> Path:
    """The folder of the shipped model of 4096 positions, which looks up what its context says."""
    return Path(__file__).with_name("recall_checkpoint")
