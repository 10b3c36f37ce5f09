"""What each table holds: its arms, the tests they take, and the published numbers.

The published numbers are those of Qwen2.5-0.5B-Instruct. The paper's own captions and the values of its sweeps could
not be looked up: which number stands in which table is this project's arrangement of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spd.arms import parse_arm, without
from spd.errors import InputError

Role = Literal["in", "out"]


@dataclass(frozen=True)
class Domain:
    """A capability and what it is tested on.

    Args:
        name: of the domain, as the command line knows it.
        capability: the task that calibrates it and whose training prompts are completed.
        inside: the test of the capability itself.
        outside: a test of the same domain from elsewhere.
        steering: a test set aside for choosing settings, where there is one.
    """

    name: str
    capability: str
    inside: str
    outside: str
    steering: str | None = None


PAPER = (
    Domain("code", "mbpp", "mbpp", "codealpaca"),
    Domain("math", "gsm8k", "gsm8k", "svamp"),
    Domain("choice", "mmlu", "mmlu", "bbh"),
)
PROVING_GROUND = (
    Domain("code", "code", "code", "code-ood", "code-steering"),
    Domain("math", "words", "words", "words-ood", "words-steering"),
    Domain("choice", "choice", "choice", "choice-ood", "choice-steering"),
)
PUBLISHED_TEST = {
    ("code", "in"): "MBPP",
    ("code", "out"): "CodeAlpaca, NLL",
    ("math", "in"): "GSM8K",
    ("math", "out"): "SVAMP",
    ("choice", "in"): "MMLU",
    ("choice", "out"): "BBH",
}
PUBLISHED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("code", "in"): {
        "base": 17.0, "self-training": 29.0, "ssd": 18.3, "spd": 25.5, "spd:loss=full": 11.9, "spd:from=choice": 21.0,
    },
    ("code", "out"): {"base": 0.683, "self-training": 0.683, "ssd": 0.682, "spd": 0.679},
    ("math", "in"): {
        "base": 11.0, "self-training": 17.0, "ssd": 12.0, "spd": 22.0, "projected": 18.0, "spd:from=choice": 26.0,
    },
    ("math", "out"): {"base": 16.0, "self-training": 19.0, "ssd": 16.0, "spd": 32.0},
    ("choice", "in"): {"base": 46.0, "self-training": 43.0, "ssd": 48.0, "spd": 49.0},
    ("choice", "out"): {"base": 32.7, "self-training": 33.7, "ssd": 36.0, "spd": 38.7, "projected": 35.3},
}  # fmt: skip
"""Accuracy in %, NLL in nats a token, by (domain, role) and arm; "from" names a domain here."""


@dataclass(frozen=True)
class Column:
    """A test, of what domain it is, and in which role: on the capability itself, out of its domain, or for steering."""

    domain: Domain
    role: str
    test: str


@dataclass(frozen=True)
class Row:
    """An arm. Its capability is that of the column's domain, or, where `trained_for` names a domain, that one's."""

    label: str
    arm: str
    trained_for: str | None = None


@dataclass(frozen=True)
class Table:
    """One table: every row on every column, compared with the row `against` (a label) by a paired test.

    Args:
        name: as the command line knows it.
        title: what it shows.
        caption: how to read it.
        rows: the arms; "@" in an arm stands for each domain's capability in turn.
        roles: which tests are columns: "in", "out", "steering", in this order.
        against: label of the row that the others are compared with.
        contrasts: further pairs of labels to compare, written below the table.
        sweep: label of the horizontal axis, for tables whose rows are values of one setting.
    """

    name: str
    title: str
    caption: str
    rows: tuple[Row, ...]
    roles: tuple[str, ...] = ("in",)
    against: str = "base"
    contrasts: tuple[tuple[str, str], ...] = ()
    sweep: str | None = None


def _rows(*arms: str) -> tuple[Row, ...]:
    return tuple(Row(arm, arm) for arm in arms)


def _sweep(option: str, values: Sequence[str]) -> tuple[Row, ...]:
    return tuple(Row(value, f"spd:{option}={value}") for value in values)


_MAIN = _rows("base", "self-training", "ssd", "spd")
_MAIN_CONTRASTS = (("spd", "self-training"), ("spd", "ssd"))
RATES = ("1e-05", "0.0001", "0.001", "0.003", "0.01")

TABLES: Mapping[str, Table] = {
    table.name: table
    for table in (
        Table("1", "In domain", "Each arm tested on the capability it was made for.", _MAIN, contrasts=_MAIN_CONTRASTS),
        Table(
            "2",
            "Out of domain",
            "The same arms on another test of the same domain.",
            _MAIN,
            roles=("out",),
            contrasts=_MAIN_CONTRASTS,
        ),
        Table(
            "3",
            "Projection without training",
            "Projected while it answers, beside trained on what it wrote under projection.",
            _rows("base", "projected", "spd"),
            roles=("in", "out"),
            contrasts=(("spd", "projected"),),
        ),
        Table(
            "4",
            "Which tokens carry the loss",
            "Subspaces from the gradients of the correctness-defining tokens, and of every token.",
            _rows("base", "spd", "spd:loss=full"),
            contrasts=(("spd", "spd:loss=full"),),
        ),
        Table(
            "5",
            "Calibrated on another domain",
            "Training prompts of the column, the subspace of the row.",
            (*_rows("base"), Row("spd, calibrated on @", "spd:from=@")),
        ),
        Table(
            "controls",
            "Does it have to be this subspace",
            "Completions written under other projections of the same rank, against SPD's.",
            _rows(
                "base", "self-training", "spd", "spd:sides=k", "spd:sides=v", "spd:subspace=random",
                "spd:subspace=activations", "spd:subspace=bottom", "spd:subspace=shuffled",
            ),
            against="spd",
        ),
        Table(
            "rounds",
            "Several rounds",
            "Each round calibrates, writes and trains from where the one before ended.",
            _rows("base", "self-training", "self-training:rounds=2", "spd", "spd:rounds=2", "spd:rounds=3"),
        ),
        Table(
            "transfer",
            "What it does to the rest",
            "Trained for the row, tested on everything; a fall beyond chance is negative transfer.",
            (
                *_rows("base"),
                Row("self-training for @", "self-training", "@"),
                Row("spd for @", "spd", "@"),
            ),
            roles=("in", "out"),
        ),
        Table(
            "calibration-size",
            "How many calibration examples",
            "SPD by the number of examples that the subspace comes from.",
            _sweep("examples", ("10", "20", "50", "100", "200", "500")),
            against="50",
            sweep="calibration examples",
        ),
        Table(
            "rank",
            "How many directions",
            "SPD by rank; the full rank projects nothing away.",
            _sweep("rank", ("4", "16", "half", "energy:0.95", "full")),
            against="half",
            sweep="rank",
        ),
        Table(
            "layers",
            "Which layers",
            "SPD by the layers that are projected.",
            _sweep("layers", ("paper", "middle", "last", "all")),
            against="paper",
            sweep="layers",
        ),
        Table(
            "learning-rate",
            "Does training move anything",
            "By learning rate, on questions set aside for choosing settings: no test question is among them.",
            (
                *_rows("base"),
                *(Row(f"{arm}, {rate}", f"{arm}:lr={rate}") for rate in RATES for arm in ("self-training", "spd")),
            ),
            roles=("steering",),
        ),
    )
}  # fmt: skip
DEFAULT_TABLES = tuple(name for name in TABLES if name != "learning-rate")
"""All that compare arms. The sweep of the learning rate is for choosing one, before the rest."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table: an arm of a capability (None: the base) on a test."""

    capability: str | None
    arm: str
    test: str


@dataclass(frozen=True)
class Layout:
    """Tables over certain domains.

    Args:
        domains: whose tests are the columns.
        default_examples: by capability, how many calibration examples an arm takes that does not say.
        available_examples: by capability, how many there are.
        learning_rate, rank, layers: those of an arm that does not say.
    """

    domains: tuple[Domain, ...]
    default_examples: Mapping[str, int]
    available_examples: Mapping[str, int]
    learning_rate: float = 0.0
    rank: int | str = "half"
    layers: str | Sequence[int] = "paper"

    def columns(self, table: Table) -> list[Column]:
        """The tests of a table, role by role."""
        tests = {"in": "inside", "out": "outside", "steering": "steering"}
        found = [Column(domain, role, getattr(domain, tests[role])) for role in table.roles for domain in self.domains]
        if any(column.test is None for column in found):
            raise InputError(
                f"table: {table.name} needs questions set aside for choosing settings; only the proving ground has such"
            )
        return found

    def rows(self, table: Table) -> list[Row]:
        """The rows, those with "@" once for each domain; an arm names no rank and no layers that it has anyway."""
        rows: list[Row] = []
        for row in table.rows:
            for domain in self.domains if "@" in row.label else self.domains[:1]:
                trained_for = row.trained_for and row.trained_for.replace("@", domain.name)
                arm = parse_arm(row.arm.replace("@", domain.capability))
                if arm.projection and arm.projection.rank == self.rank:
                    arm = without(arm, "rank")
                if arm.projection and arm.projection.layers == self.layers:
                    arm = without(arm, "layers")
                rows.append(Row(row.label.replace("@", domain.name), arm.name, trained_for))
        return rows

    def cell(self, row: Row, column: Column) -> Cell | None:
        """The entry at a row and a column; None where there are not as many examples as the row asks for."""
        if row.arm == "base":
            return Cell(None, "base", column.test)
        trained = next((domain for domain in self.domains if domain.name == row.trained_for), column.domain)
        arm, capability = parse_arm(row.arm), trained.capability
        if arm.projection and (examples := arm.projection.examples):
            if examples > self.available_examples[capability]:
                return None
            if examples == self.default_examples[capability]:
                arm = without(arm, "examples")
        if arm.projection and arm.projection.source == capability:
            arm = without(arm, "from")
        if arm.learning_rate == self.learning_rate:
            arm = without(arm, "lr")
        return Cell(capability, arm.name, column.test)

    def published(self, row: Row, column: Column) -> float | None:
        """The paper's number for an entry, if it is known."""
        found = self.cell(row, column)
        if found is None or row.trained_for not in (None, column.domain.name):
            return None
        arm = found.arm
        for domain in self.domains:
            arm = arm.replace(f"from={domain.capability}", f"from={domain.name}")
        return PUBLISHED.get((column.domain.name, column.role), {}).get(arm)
