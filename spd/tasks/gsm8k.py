"""GSM8K (Cobbe et al. 2021): grade-school word problems with worked answers that end in `#### n`."""

from __future__ import annotations

from typing import Any, ClassVar

from spd.tasks.word_problems import WordProblems


class GSM8K(WordProblems):
    name = "gsm8k"
    hub = ("openai/gsm8k", "main")
    fields: ClassVar = {"question": (str,), "answer": (str,)}

    def prompt(self, record: dict[str, Any]) -> str:
        return f"Question: {record['question'].strip()}\nAnswer:"

    def worked_answer(self, record: dict[str, Any]) -> str:
        return str(record["answer"])
