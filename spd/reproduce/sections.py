"""The report's parts as text, before they become Markdown or a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd.arms import ARMS, SSD, parse_arm, without
from spd.diagnostics import Change
from spd.reproduce.findings import OffTarget, holm_text, metric_of, p_text, points, signed
from spd.reproduce.settings import ReproduceSettings
from spd.reproduce.summary import ALPHA, Entry, Outcomes, Summary
from spd.reproduce.tables import PUBLISHED_TEST, Cell, Column, Domain, Layout, Row

MISSING = "–"
SHOWN = 10
"""Numbers of questions that a note lists."""
PUBLISHED_FOR = {
    "paper": "Published numbers (arXiv 2605.22675) are those of Qwen2.5-0.5B-Instruct: compare them with a run on that "
    "model, and with no other. ",
    "proving-ground": "Published numbers (arXiv 2605.22675) are those of Qwen2.5-0.5B-Instruct on other data sets, "
    "which the header names. They say what the paper found; nothing measured here can be compared with them. ",
}
ARRANGED = (
    "The paper's captions and the values of its sweeps could not be looked up: which published number stands in which "
    "table is this project's arrangement."
)
CHOSEN = {
    "paper": " The wording of the prompts, which six of BBH's sub-tasks and which 200 of MMLU's questions are asked, "
    f"and how SSD samples (temperature {SSD.temperature:g}, top-k {SSD.top_k}, top-p {SSD.top_p:g}) are this "
    "project's choice too: a difference from a published number may come from them.",
    "proving-ground": f" How SSD samples (temperature {SSD.temperature:g}, top-k {SSD.top_k}, top-p {SSD.top_p:g}) is "
    "this project's choice.",
}
HOW_TO_READ = (
    "Accuracy in % [95 % Wilson interval], greedy decoding; NLL in nats a token [95 % interval, Student's t], lower is "
    "better. Seeds answer the same questions: a value is their mean, n counts questions, and the interval is that of n "
    "questions.",
    "p is two-sided, against the row that a table is compared with: the exact sign-flip test over questions (McNemar's "
    "where there is one seed), the paired t-test for NLL. A number is bold if it is better than that row beyond "
    "chance, and marked ▾ if it is worse beyond chance: if Holm's p, which is adjusted over its table, is below .05. "
    "Holm's p is given wherever p itself is below .05.",
    "Changed: the share of answers that read otherwise than the base's, mean over the tests. Comparisons below a table "
    "count up for better, and their p is not adjusted.",
)
SHIFT_TEXT = (
    "How far projection moves what the model writes, and how much of that is left in the tuned model without it: KL "
    "divergences in thousandths of a nat a token [95 % percentile bootstrap interval over texts], exact over the "
    "vocabulary, on completions that the projected policy wrote. Kept: 1 − KL(projected ‖ tuned) / KL(projected ‖ "
    "base), 100 % if the tuned model is the projected policy, 0 if it is as far from it as the base is, below 0 if "
    "farther; – where projection moves nothing."
)
PERPLEXITY_TEXT = (
    "Perplexity on neutral text that no arm was made for, and by how many per cent it is above the base's on the same "
    "texts [95 % interval over texts]; p of the paired t-test, text by text, Holm's over all arms and capabilities. "
    "Bold is lower beyond chance, ▾ higher beyond chance."
)
DRIFT_TEXT = (
    "Each round calibrates anew, on the model that the round before left. Overlap with the first round's subspace is "
    "the mean squared cosine of the principal angles: 1 for the same subspace, and what the last row says for a random "
    "one."
)
TRANSFER_TEXT = (
    "Each arm on the tests that are not of its own domain, beside the base. A fall beyond chance is negative transfer. "
    "Holm's p is over these tests of an arm: fewer than the whole table, so that a fall may be flagged here alone."
)


@dataclass(frozen=True)
class Shown:
    """One cell: a number, its interval, what follows it, and the verdict that decides how it looks."""

    text: str = MISSING
    interval: str = ""
    notes: tuple[str, ...] = ()
    verdict: str = ""
    published: bool = False


@dataclass(frozen=True)
class Section:
    """A table with what is said above and below it.

    Args:
        name: its anchor, and the name of its figure's file.
        title: its heading.
        text: paragraphs above the table.
        head: the table's header.
        rows: its cells; the first `labels` of each row are text.
        notes: lines below the table.
        hints: for every row, what its arm is.
        starts: rows before which a group begins.
        labels: how many leading columns are text.
        reference: the row that the others are compared with.
    """

    name: str
    title: str
    text: tuple[str, ...]
    head: list[Shown]
    rows: list[list[Shown]]
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    starts: tuple[int, ...] = ()
    labels: int = 1
    reference: int | None = None


def facts(
    settings: ReproduceSettings,
    layout: Layout,
    environments: Sequence[Mapping[str, Any]],
    prompts_of: Mapping[str, Mapping[str, Any]],
    diagnostics: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str]]:
    """What the numbers were made with, each with its name.

    Args:
        settings, layout, environments: of the experiment.
        prompts_of: by capability, how many training prompts there were, and which the model had no room for.
        diagnostics: as `spd.reproduce.diagnose` returned them, by capability.
    """
    generation, training, calibration = settings.generation, settings.training, settings.calibration
    sizes = {f"{each['parameters'] / 1e6:,.1f} M parameters, {each['dtype']}": None for each in environments}
    examples = ", ".join(f"{layout.default_examples[d.capability]} of {d.capability}" for d in layout.domains)
    layers = calibration.layers if isinstance(calibration.layers, str) else ", ".join(map(str, calibration.layers))
    prompts = f"the first {generation.prompts}" if generation.prompts else "all"
    limit = settings.evaluation.questions
    dropped = [
        f"{len(each['too_long'])} of {each['prompts']} of {capability}"
        for capability, each in prompts_of.items()
        if each["too_long"]
    ]
    without_room = f"; left out, since the model has no room for them: {', '.join(dropped)}" if dropped else ""
    devices = [
        ("device", f"{each['device']}; " + ", ".join(f"{name} {which}" for name, which in each["versions"].items()))
        for each in environments
    ]
    return [
        ("model", "; ".join([settings.model, *sizes])),
        *devices,
        ("data", settings.data or ("generated" if settings.suite == "proving-ground" else "from the hub")),
        ("seeds", ", ".join(map(str, settings.seeds)) + "; what is neither sampled nor trained is made once"),
        ("calibration", f"examples: {examples}; layers {layers}; rank {calibration.rank}; loss on {calibration.loss}"),
        (
            "completions",
            f"of {prompts} training prompts of a capability, one each, temperature {generation.temperature:g}, "
            f"top-p {generation.top_p:g}{without_room}",
        ),
        (
            "training",
            f"learning rate {training.learning_rate:g}, epochs {training.epochs:g}, batch {training.batch_size}, "
            f"LoRA rank {training.lora_rank}",
        ),
        (
            "tests",
            f"the first {limit} questions of each"
            if limit
            else "as many questions of each as its task asks by default",
        ),
        ("diagnostics", f"seed {settings.seeds[0]}"),
        *([("neutral text", _neutral(settings, diagnostics))] if settings.diagnostics.texts else []),
    ]


def _neutral(settings: ReproduceSettings, diagnostics: Mapping[str, Mapping[str, Any]]) -> str:
    source = settings.neutral or "generated, the filler of the proving ground's pretraining"
    left_out = max((each.get("neutral", {}).get("left_out", 0) for each in diagnostics.values()), default=0)
    return f"{source}; {left_out} left out, too long for the model or of a single token" if left_out else source


def table_section(summary: Summary, suite: str) -> Section:
    """One table of the experiment."""
    table = summary.table
    shown = [_shows_published(summary, index, suite) for index in range(len(summary.columns))]
    head = [Shown(table.sweep or "arm")]
    for index, column in enumerate(summary.columns):
        nll = ", NLL" if metric_of(summary, index) == "nll" else ""
        head.append(Shown(column.test + nll, f"n = {_count(summary, index)}"))
        if shown[index]:
            head.append(Shown("published", PUBLISHED_TEST[column.domain.name, column.role], published=True))
    rows = []
    for row, line in zip(summary.rows, summary.entries, strict=True):
        cells = [Shown(row.label)]
        for entry, column, published in zip(line, summary.columns, shown, strict=True):
            cells += [_entry_cell(entry), *([_published_cell(entry, column)] if published else [])]
        rows.append([*cells, _changed_cell(row, line)])
    return Section(
        f"table-{table.name}",
        f"{table.title} (table {table.name})",
        (f"{table.caption} Compared with: {table.against}.",),
        [*head, Shown("changed", "%")],
        rows,
        [*_explained(summary), *_contrasts(summary), *_left_out(summary)],
        [parse_arm(row.arm).meaning for row in summary.rows],
        tuple(i for i, row in enumerate(summary.rows) if row.trained_for and row.arm != summary.rows[i - 1].arm),
        reference=[row.label for row in summary.rows].index(table.against),
    )


def shift_section(diagnostics: Mapping[str, Mapping[str, Any]], order: Mapping[str, int]) -> Section | None:
    """What training kept of the projection."""
    rows: list[list[Shown]] = []
    starts, texts = [], set()
    for capability, diagnosed in diagnostics.items():
        starts.append(len(rows))
        for arm in sorted(diagnosed["shift"], key=lambda arm: order.get(arm, len(order))):
            shift = diagnosed["shift"][arm]
            texts.add(shift["texts"])
            rows.append(
                [
                    Shown(capability),
                    Shown(arm),
                    *(_divergence_cell(shift[name]) for name in ("projected_base", "projected_tuned", "tuned_base")),
                    _kept_cell(shift["kept"]),
                ]
            )
    if not rows:
        return None
    counted = " or ".join(map(str, sorted(texts)))
    divergences = ("KL(projected ‖ base)", "KL(projected ‖ tuned)", "KL(tuned ‖ base)")
    head = [Shown("made for"), Shown("arm"), *map(Shown, divergences), Shown("kept", "%")]
    return Section(
        "shift",
        "Does what projection does survive training",
        (f"{SHIFT_TEXT} {counted} completions an arm.",),
        head,
        rows,
        hints=[parse_arm(row[1].text).meaning for row in rows],
        starts=tuple(starts[1:]),
        labels=2,
    )


def _kept_cell(kept: Sequence[float] | None) -> Shown:
    """In per cent; where training moved the model farther than projection did, how much farther says little."""
    if kept is None:
        return Shown()
    if kept[0] < -1:
        return Shown("< −100")
    middle, low, high = (signless(100 * each, 0) for each in kept)
    return Shown(middle, f"[{low}, {high}]")


def perplexity_section(
    found: Sequence[OffTarget], diagnostics: Mapping[str, Mapping[str, Any]], order: Mapping[str, int]
) -> Section | None:
    """Perplexity off target."""
    if not found:
        return None
    cells = {(each.arm, each.capability): each for each in found}
    capabilities = list(dict.fromkeys(each.capability for each in found))
    arms = sorted({each.arm for each in found}, key=lambda arm: order.get(arm, len(order)))
    bases = [diagnostics[capability]["perplexity"]["base"] for capability in capabilities]
    rows = [[Shown("base"), *(_perplexity_base(base) for base in bases)]]
    rows += [[Shown(arm), *(_perplexity_cell(cells.get((arm, each))) for each in capabilities)] for arm in arms]
    flagged = [each for each in found if each.verdict == "worse"]
    note = f"Of {len(found)} arms, {len(flagged) or 'none'} made neutral text less likely beyond chance."
    counted = " or ".join(map(str, sorted({len(base["texts"]) for base in bases})))
    return Section(
        "perplexity",
        "Neutral text",
        (f"{PERPLEXITY_TEXT} {counted} texts.",),
        [Shown("arm"), *(Shown("made for", each) for each in capabilities)],
        rows,
        [note],
        [parse_arm(row[0].text).meaning for row in rows],
        reference=0,
    )


def drift_section(
    diagnostics: Mapping[str, Mapping[str, Any]], outcomes: Mapping[Cell, Outcomes], domains: Sequence[Domain]
) -> Section | None:
    """How far the subspace moves from round to round, and the accuracy of each round."""
    head, columns = [Shown("site")], []
    sites: dict[str, None] = {}
    for domain in domains:
        drift = diagnostics.get(domain.capability, {}).get("drift")
        if not drift:
            continue
        arm = parse_arm(max(drift, key=lambda name: parse_arm(name).rounds))
        first: dict[str, Any] = {"round": 1, "overlap": {}}
        for found in [first, *drift[arm.name]]:
            sites |= dict.fromkeys(found["overlap"])
            single = without(arm, "rounds")
            name = single.name if found["round"] == 1 else _with_rounds(single.name, found["round"])
            of_round = outcomes.get(Cell(domain.capability, name, domain.inside))
            head.append(Shown(domain.capability, f"round {found['round']}"))
            columns.append((found, of_round))
    if not columns:
        return None
    accuracy = [Shown("its own test"), *(_outcomes_cell(of_round) for _, of_round in columns)]
    rows = [[Shown(site), *(_share(found["overlap"].get(site)) for found, _ in columns)] for site in sites]
    chance = [Shown("by chance"), *(_share(found.get("by_chance")) for found, _ in columns)]
    return Section(
        "drift", "Drift over rounds", (DRIFT_TEXT,), head, [accuracy, *rows, chance], starts=(1, len(rows) + 1)
    )


def transfer_section(found: Sequence[tuple[Row, Sequence[Change]]], metrics: Mapping[str, str]) -> Section | None:
    """Negative transfer, flagged."""
    if not found:
        return None
    rows, flagged = [], []
    for row, tested in found:
        fallen = [each for each in tested if each.fell]
        flagged += [f"{row.label} on {each.task}" for each in fallen]
        lowest = min(tested, key=lambda each: (each.change >= 0, each.p))
        rows.append(
            [
                Shown(row.label),
                Shown(str(len(tested))),
                Shown(", ".join(each.task for each in fallen) or "none", verdict="worse" if fallen else ""),
                Shown(
                    f"{lowest.task} {change_text(lowest, metrics)}",
                    notes=(p_text(lowest.p), holm_text(lowest.adjusted)),
                )
                if lowest.change < 0
                else Shown("no fall"),
            ]
        )
    checks = sum(len(tested) for _, tested in found)
    note = f"Negative transfer in {len(flagged)} of {checks} checks: {'; '.join(flagged)}."
    if not flagged:
        note = f"No negative transfer: in {checks} checks, no fall beyond chance."
    head = [Shown(each) for each in ("arm", "tests off target", "falls beyond chance", "fall of the lowest p")]
    return Section("negative-transfer", "Negative transfer", (TRANSFER_TEXT,), head, rows, [note])


def change_text(change: Change, metrics: Mapping[str, str]) -> str:
    """A mean difference, arm minus base, in the unit of the test's metric."""
    of_test = metrics[change.task]
    return points(change.change if of_test == "nll" else 100 * change.change, of_test)


def arm_meanings(summaries: Iterable[Summary]) -> list[tuple[str, str]]:
    """The kinds of arms that occur, without their options."""
    used = {row.arm.partition(":")[0] for summary in summaries for row in summary.rows}
    return [(name, arm.meaning) for name, arm in ARMS.items() if name in used]


def value_text(value: float, metric: str) -> str:
    return f"{value:.3f}" if metric == "nll" else f"{value:.1f}"


def signless(value: float, decimals: int) -> str:
    """As `signed`, without a plus."""
    return signed(value, decimals).removeprefix("+")


def _count(summary: Summary, index: int) -> str:
    """The questions of a column: one number, unless the arms differ in it."""
    counts = sorted({entry.outcomes.n for line in summary.entries if (entry := line[index])})
    return " to ".join(map(str, counts[:1] + counts[1:][-1:])) or "0"


def _shows_published(summary: Summary, index: int, suite: str) -> bool:
    """Numbers of other data sets stand in the paper's own, numbered tables only; none where rows are of any domain."""
    known = any(entry.published is not None for line in summary.entries if (entry := line[index]))
    own = suite == "paper" and not any(row.trained_for for row in summary.rows)
    return known and (own or summary.table.name.isdecimal())


def _entry_cell(entry: Entry | None) -> Shown:
    if entry is None:
        return Shown()
    shown = _outcomes_cell(entry.outcomes)
    notes = () if entry.p is None or entry.adjusted is None else _ps(entry.p, entry.adjusted)
    return Shown(shown.text, shown.interval, (*notes, *shown.notes), entry.verdict)


def _ps(p: float, adjusted: float) -> tuple[str, ...]:
    """p, and Holm's where it decides."""
    return (p_text(p), holm_text(adjusted)) if p < ALPHA else (p_text(p),)


def _outcomes_cell(outcomes: Outcomes | None) -> Shown:
    if outcomes is None:
        return Shown()
    low, high = outcomes.interval
    parse = () if outcomes.parse_rate is None else (f"{outcomes.parse_rate:.0f} % parse",)
    interval = f"[{low:.3f}, {high:.3f}]" if outcomes.metric == "nll" else f"[{low:.0f}, {high:.0f}]"
    if outcomes.metric == "nll" and outcomes.n < 2:
        interval = ""
    return Shown(value_text(outcomes.value, outcomes.metric), interval, parse)


def _published_cell(entry: Entry | None, column: Column) -> Shown:
    if entry is None or entry.published is None:
        return Shown(published=True)
    of_published = "nll" if "NLL" in PUBLISHED_TEST[column.domain.name, column.role] else "accuracy"
    return Shown(value_text(entry.published, of_published), published=True)


def _changed_cell(row: Row, line: Sequence[Entry | None]) -> Shown:
    shares = [entry.outcomes.changed for entry in line if entry is not None]
    if row.arm == "base" or not shares:
        return Shown()
    return Shown(f"{100 * sum(shares) / len(shares):.1f}")


def _explained(summary: Summary) -> list[str]:
    """What an arm's options mean, where the row is called by its arm and more than rounds are counted."""
    named = [row for row in summary.rows if row.label == row.arm and ":" in row.arm and parse_arm(row.arm).rounds == 1]
    return [f"{row.label}: {parse_arm(row.arm).meaning.partition('; ')[2]}." for row in named]


def _contrasts(summary: Summary) -> list[str]:
    lines: dict[tuple[str, str], list[str]] = {}
    for each in summary.contrasts:
        of_column = metric_of(summary, summary.columns.index(each.column))
        found = f"{each.column.test} {points(each.difference, of_column)}, {p_text(each.p)}"
        lines.setdefault((each.row, each.other), []).append(found)
    return [f"{row} against {other}: {'; '.join(found)}." for (row, other), found in lines.items()]


def _left_out(summary: Summary) -> list[str]:
    left_out = []
    for index, column in enumerate(summary.columns):
        of_arms = [entry.outcomes for line in summary.entries if (entry := line[index])]
        most = max(of_arms, key=lambda outcomes: outcomes.too_long, default=None)
        if most and most.too_long:
            numbers = ", ".join(map(str, most.left_out[:SHOWN])) + (", ..." if len(most.left_out) > SHOWN else "")
            left_out.append(f"{most.too_long} of {column.test} (questions {numbers}, counted from 0)")
    return [f"Left out, since they are too long for the model: {', '.join(left_out)}."] if left_out else []


def _divergence_cell(interval: Sequence[float]) -> Shown:
    middle, low, high = (1e3 * each for each in interval)
    decimals = 0 if middle >= 100 else 1 if middle >= 10 else 3
    return Shown(f"{middle:.{decimals}f}", f"[{signless(low, decimals)}, {signless(high, decimals)}]")


def _perplexity_base(base: Mapping[str, Any]) -> Shown:
    return Shown(f"{base['value']:.3f}", f"[{base['low']:.3f}, {base['high']:.3f}]")


def _perplexity_cell(found: OffTarget | None) -> Shown:
    if found is None:
        return Shown()
    more, low, high = (100 * (each - 1) for each in found.ratio)
    shown = f"{signed(more, 2)} % [{signless(low, 2)}, {signless(high, 2)}]"
    return Shown(f"{found.perplexity:.3f}", shown, _ps(found.p, found.adjusted), found.verdict)


def _share(value: float | None) -> Shown:
    return Shown() if value is None else Shown(f"{value:.3f}")


def _with_rounds(name: str, rounds: int) -> str:
    return parse_arm(f"{name}{',' if ':' in name else ':'}rounds={rounds}").name
