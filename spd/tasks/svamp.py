"""SVAMP (Patel et al. 2021): one-step word problems with varied wording; in the paper the sibling of GSM8K.

The worked answer is made from the record's equation and answer.
"""

from __future__ import annotations

from spd.tasks.records import Record, Records
from spd.tasks.word_problems import WordProblems


class SVAMP(WordProblems):
    name = "svamp"
    harness_stop = None
    records = Records(
        "svamp",
        ("ChilleD/SVAMP", None),
        {"Body": (str,), "Question": (str,), "Equation": (str,), "Answer": (str, int, float)},
        may_be_empty=("Body",),
        key="ID",
    )

    def prompt(self, record: Record) -> str:
        body = record["Body"].strip()
        if body and body[-1] not in ".!?,":
            body += "."
        return f"Question: {body} {record['Question'].strip()}\nAnswer:"

    def worked_answer(self, record: Record) -> str:
        return f"{record['Equation']} = {record['Answer']}\n#### {record['Answer']}"
