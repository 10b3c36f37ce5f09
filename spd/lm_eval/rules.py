"""What the YAML files beside this one call: the prompts, references and rules of `spd.tasks`, one record at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spd.tasks.base import Question, Task
from spd.tasks.bbh import BBH, same_answer
from spd.tasks.codealpaca import TEST, CodeAlpaca
from spd.tasks.gsm8k import GSM8K
from spd.tasks.mmlu import MMLU
from spd.tasks.records import Record
from spd.tasks.svamp import SVAMP

Score = Callable[[Record, Sequence[str]], dict[str, float]]


def _score(task: Task, reference: Callable[[Record], str]) -> Score:
    def score(record: Record, results: Sequence[str]) -> dict[str, float]:
        return {"acc": float(task.is_correct(results[0], Question("", reference(record))))}

    return score


gsm8k_prompt, gsm8k_target = GSM8K().prompt, GSM8K().worked_answer
gsm8k_score = _score(GSM8K(), gsm8k_target)

svamp_prompt, svamp_target = SVAMP().prompt, SVAMP().worked_answer
svamp_score = _score(SVAMP(), svamp_target)

bbh_prompt = BBH().prompt
mmlu_prompt = MMLU().prompt


def bbh_score(record: Record, results: Sequence[str]) -> dict[str, float]:
    return {"acc": float(same_answer(results[0], record["target"].strip()))}


def codealpaca_test(records: Any) -> Any:
    """The last records of a data set, which are the test."""
    return records.select(range(max(0, len(records) - TEST), len(records)))


def codealpaca_prompt(record: Record) -> str:
    """Without the line break at the end, which the harness would move to the output."""
    return CodeAlpaca().prompt(record).removesuffix("\n")


def codealpaca_target(record: Record) -> str:
    return f"\n{record['output']}"


def codealpaca_score(record: Record, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Nats a byte, since the harness does not say how many tokens a text has."""
    return {"nll_per_byte": -results[0][0] / len(codealpaca_target(record).encode())}
