"""GSM8K (Cobbe et al. 2021): grade-school word problems with worked answers that end in `#### n`."""

from __future__ import annotations

from spd.tasks.harness import context, drawn_shots
from spd.tasks.records import Record, Records
from spd.tasks.word_problems import WordProblems


class GSM8K(WordProblems):
    """Harness prompts have 5 shots from the training split, drawn for every question."""

    name = "gsm8k"
    harness_stop = ("Question:",)
    records = Records("gsm8k", ("openai/gsm8k", "main"), {"question": (str,), "answer": (str,)})

    def prompt(self, record: Record) -> str:
        return f"Question: {record['question'].strip()}\nAnswer:"

    def worked_answer(self, record: Record) -> str:
        return str(record["answer"])

    def harness_prompts(self, records: list[Record]) -> list[str]:
        drawn = drawn_shots(self._training, 5, len(records))
        return [
            context([(self.prompt(shot), shot["answer"]) for shot in shots], self.prompt(record))
            for record, shots in zip(records, drawn, strict=True)
        ]
