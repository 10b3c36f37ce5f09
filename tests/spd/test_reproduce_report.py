"""The report of a reproduction, from made-up results: no model is needed."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from spd.arms import parse_arm
from spd.files import write_json
from spd.reproduce import figures
from spd.reproduce.experiment import cells_of, layout_of
from spd.reproduce.findings import conclude, negative_transfer, off_target, p_text, points, signed
from spd.reproduce.report import write_report
from spd.reproduce.settings import ReproduceSettings
from spd.reproduce.summary import Outcomes, summarise
from spd.reproduce.tables import TABLES, Cell, Layout
from spd.stats import holm, wilson_interval

N = 40
Verdicts = Callable[[Cell, int], str]
"""Which of a cell's answers are right under a seed: a 1 or a 0 for every question."""


def settings_of(suite: str = "proving-ground", domains: Sequence[str] = ("math",), **more: Any) -> ReproduceSettings:
    return ReproduceSettings(model=more.pop("model", "made-up"), suite=suite, domains=list(domains), **more)


def layout_for(settings: ReproduceSettings, available: int = 120) -> Layout:
    names = [domain.capability for domain in settings.suite_domains]
    rate = settings.training.learning_rate
    return Layout(settings.suite_domains, dict.fromkeys(names, 50), dict.fromkeys(names, available), rate)


def made(
    settings: ReproduceSettings,
    tables: Sequence[str],
    right: Verdicts,
    *,
    nll: Callable[[Cell, int], list[float]] | None = None,
    layout: Layout | None = None,
    diagnostics: Mapping[str, Any] | None = None,
    changed: float = 0.75,
    too_long: Sequence[int] = (),
) -> dict[str, Any]:
    """`results.json` as an experiment writes it. With `nll`, what is tested on codealpaca is judged by that."""
    layout = layout or layout_for(settings)
    cells = []
    for cell in cells_of([TABLES[name] for name in tables], layout):
        judged_by_nll = nll is not None and cell.test == "codealpaca"
        outcomes = [
            {
                "metric": "nll" if judged_by_nll else "accuracy",
                "correct": right(cell, seed),
                "nll": nll(cell, seed) if nll is not None and judged_by_nll else [],
                "changed": changed if cell.capability else 0.0,
                "too_long": list(too_long),
            }
            for seed in (settings.seeds if parse_arm(cell.arm).trained else [0])
        ]
        cells.append({"capability": cell.capability, "arm": cell.arm, "test": cell.test, "outcomes": outcomes})
    return {
        "command": "spd reproduce",
        "settings": settings.as_dict(),
        "layout": {
            "default_examples": layout.default_examples,
            "available_examples": layout.available_examples,
            "learning_rate": layout.learning_rate,
        },
        "tables": list(tables),
        "cells": cells,
        "diagnostics": dict(diagnostics or {}),
    }


def written(folder: Path, results: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Markdown, data and page of made-up results."""
    write_json(folder / "results.json", results)
    path = write_report(folder)
    assert path == folder / "tables.md"
    return path.read_text(), json.loads((folder / "tables.json").read_text()), (folder / "report.html").read_text()


def rows_of(markdown: str, title: str) -> dict[str, list[str]]:
    """The table below a heading, by the first cell of each row."""
    part = markdown.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def steady(base: int, arm: int, n: int = N) -> Verdicts:
    """`base` questions right before, `arm` after; those that were right stay so, or the last of them fall."""
    return lambda cell, seed: ("1" * (arm if cell.capability else base)).ljust(n, "0")


def by_chance(chance: float) -> Verdicts:
    """Answers that differ a little from arm to arm and from seed to seed."""

    def right(cell: Cell, seed: int) -> str:
        base, rng = random.Random(cell.test), random.Random(f"{cell}/{seed}")
        kept = [base.random() < 0.5 for _ in range(N)]
        return "".join(str(int(each != (cell.capability is not None and rng.random() < chance))) for each in kept)

    return right


def texts(extra: Sequence[float]) -> list[dict[str, float]]:
    return [{"nll": 10.0 + more, "tokens": 10} for more in extra]


def perplexity(extra: Sequence[float]) -> dict[str, Any]:
    found = texts(extra)
    value = math.exp(sum(each["nll"] for each in found) / sum(each["tokens"] for each in found))
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "texts": found}


def shift(moved: float, kept: float | None) -> dict[str, Any]:
    left = moved * (1 - (kept or 0))
    return {
        "projected_tuned": [left, left / 2, 2 * left],
        "projected_base": [moved, moved / 2, 2 * moved],
        "tuned_base": [moved / 10, -moved / 10, moved / 5],
        "kept": None if kept is None else [kept, kept - 0.1, kept + 0.1],
        "texts": 20,
        "tokens": 900,
    }


def diagnosed(arms: Sequence[str]) -> dict[str, Any]:
    projected = [arm for arm in arms if parse_arm(arm).projection and parse_arm(arm).rounds == 1]
    return {
        "arms": list(arms),
        "shift": {
            arm: shift(10 ** -(1 + index % 5), 0.25 if index % 4 else None) for index, arm in enumerate(projected)
        },
        "perplexity": {
            "base": perplexity([0.0] * 8),
            **{arm: perplexity([0.01 * (index + each % 3) for each in range(8)]) for index, arm in enumerate(arms)},
        },
        "drift": {
            "spd:rounds=3": [
                {"round": 2, "overlap": {"layer 3 K": 0.9, "layer 3 V": 0.8}, "by_chance": 0.5},
                {"round": 3, "overlap": {"layer 3 K": 0.7, "layer 3 V": 0.6}, "by_chance": 0.5},
            ]
        },
    }


# The tables


def test_every_number_of_a_small_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base 2 of 8, then 8 of 8: six questions changed one way, p = 2 / 2^6. Wilson's intervals by hand."""
    small = replace(TABLES["1"], rows=(TABLES["1"].rows[0], TABLES["1"].rows[3]), contrasts=())
    monkeypatch.setitem(TABLES, "1", small)  # type: ignore[arg-type]
    markdown, data, _ = written(tmp_path, made(settings_of(), ["1"], steady(2, 8, n=8)))
    assert rows_of(markdown, "In domain (table 1)") == {
        "arm": ["words, n = 8", "published, GSM8K", "changed, %"],
        "---": ["---:", "---:", "---:"],
        "base": ["25.0 [7, 59]", "11.0", "–"],
        "spd": ["**100.0** [68, 100] p .031, Holm .031", "22.0", "75.0"],
    }
    (table,) = data["tables"]
    ((base,), (spd,)) = (row["entries"] for row in table["rows"])
    assert (base["value"], base["p"], base["published"], base["n"], base["seeds"]) == (25.0, None, 11.0, 8, 1)
    assert (spd["value"], spd["difference"], spd["p"], spd["adjusted_p"]) == (100.0, 75.0, 2 / 64, 2 / 64)
    assert (spd["verdict"], spd["published"], spd["seeds"], spd["changed"]) == ("better", 22.0, 3, 0.75)
    assert spd["interval_95"] == pytest.approx([100 * 8 / (8 + 1.959964**2), 100])
    assert base["interval_95"] == pytest.approx([7.15, 59.07], abs=0.01)


@pytest.mark.parametrize(
    ("base", "arm", "shown"),
    [
        (20, 30, "**75.0** [60, 86] p .002, Holm .006"),
        (20, 26, "65.0 [50, 78] p .031, Holm .094"),  # beyond chance alone, within chance among three
        (20, 10, "25.0▾ [14, 40] p .002, Holm .006"),
        (20, 20, "50.0 [35, 65] p 1"),
    ],
)
def test_bold_and_marked_only_beyond_chance(tmp_path: Path, base: int, arm: int, shown: str) -> None:
    markdown, _, page = written(tmp_path, made(settings_of(), ["1"], steady(base, arm)))
    for name in ("self-training", "ssd", "spd"):
        assert rows_of(markdown, "In domain (table 1)")[name][0] == shown
    assert ("**" in markdown) == ("**" in shown)
    assert page.count('class="better"') == 3 * ("**" in shown)
    assert page.count('class="worse"') == 3 * ("▾" in shown)


def test_published_numbers_stand_beside_the_measured(tmp_path: Path) -> None:
    right = steady(20, 24)
    markdown, data, _ = written(tmp_path / "small", made(settings_of(), ["1", "3", "rounds"], right))
    assert "nothing measured here can be compared with them" in markdown
    table = rows_of(markdown, "In domain (table 1)")
    assert [table[arm][1] for arm in ("base", "self-training", "ssd", "spd")] == ["11.0", "17.0", "12.0", "22.0"]
    assert rows_of(markdown, "Projection without training (table 3)")["projected"][1::2] == ["18.0", "–"]
    assert "published" not in str(rows_of(markdown, "Several rounds (table rounds)"))  # other data sets: once is enough
    rounds = next(table for table in data["tables"] if table["table"] == "rounds")
    assert [row["entries"][0]["published"] for row in rounds["rows"]] == [11.0, 17.0, None, 22.0, None, None]

    markdown, _, _ = written(tmp_path / "paper", made(settings_of("paper"), ["rounds", "transfer"], right))
    assert "nothing measured here" not in markdown and "compare them with a run on that model" in markdown
    assert rows_of(markdown, "Several rounds (table rounds)")["spd"][1] == "22.0"
    assert "published" not in str(rows_of(markdown, "What it does to the rest (table transfer)"))


def test_nll_has_its_own_digits_unit_and_parse_rate(tmp_path: Path) -> None:
    def nll(cell: Cell, seed: int) -> list[float]:
        return [0.5 + 0.01 * text - (0.02 + 0.001 * (text % 3) if cell.capability else 0) for text in range(N)]

    settings = settings_of("paper", ["code"])
    markdown, data, _ = written(tmp_path, made(settings, ["2"], steady(30, 36), nll=nll, too_long=[3, 5]))
    table = rows_of(markdown, "Out of domain (table 2)")
    assert table["arm"][:2] == ["codealpaca, NLL, n = 40", "published, CodeAlpaca, NLL"]
    assert table["base"][:2] == ["0.695 [0.658, 0.732] 75 % parse", "0.683"]
    assert table["spd"][0].startswith("**0.674** [0.637, 0.711] p < .001, Holm < .001, 90 % parse")
    assert "spd against ssd: codealpaca 0.000 nats, p 1." in markdown
    assert "too long for the model: 2 of codealpaca (questions 3, 5, counted from 0)." in markdown
    assert data["tables"][0]["rows"][3]["entries"][0]["difference"] == pytest.approx(0.021, abs=1e-3)


def test_what_is_missing_is_a_dash(tmp_path: Path) -> None:
    results = made(settings_of(), ["calibration-size", "5"], steady(20, 24), layout=layout_for(settings_of(), 60))
    markdown, data, _ = written(tmp_path, results)
    table = rows_of(markdown, "How many calibration examples (table calibration-size)")
    assert table["calibration examples"] == ["words, n = 40", "changed, %"]
    assert "100" not in table and "500" not in table, "what the records are too few for is no row"
    assert table["20"][0].startswith("60.0 [") and table["50"] == ["60.0 [45, 74]", "75.0"]
    size = next(table for table in data["tables"] if table["table"] == "calibration-size")
    assert [row["entries"] == [None] for row in size["rows"]] == [False] * 3


def test_too_few_examples_for_the_row_of_comparison(tmp_path: Path) -> None:
    results = made(settings_of(), ["calibration-size"], steady(20, 24), layout=layout_for(settings_of(), 30))
    markdown, data, _ = written(tmp_path, results)
    assert "Compared with: 20." in markdown
    assert [row["label"] for row in data["tables"][0]["rows"]] == ["10", "20"]


def test_the_text_says_what_was_left_out_and_chosen(tmp_path: Path) -> None:
    results = made(settings_of("paper"), ["1"], steady(20, 24), too_long=range(12))
    results |= {"prompts": {"gsm8k": {"prompts": 7473, "too_long": [4, 9]}}}
    results |= {"diagnostics": {"gsm8k": diagnosed(["spd"]) | {"neutral": {"left_out": 3}}}}
    markdown, _, page = written(tmp_path, results)
    for said in (
        "no room for them: 2 of 7473 of gsm8k",
        "12 of gsm8k (questions 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..., counted from 0)",
        "top-k 20, top-p 0.8) are this project",
        "pretraining; 3 left out",
    ):
        assert said in markdown and said in page.replace("&#39;", "'")


def test_the_nll_of_one_question_has_no_interval(tmp_path: Path) -> None:
    results = made(settings_of("paper", ["code"]), ["2"], steady(1, 1, n=1), nll=lambda cell, seed: [0.7])
    markdown, data, _ = written(tmp_path, results)
    assert rows_of(markdown, "Out of domain (table 2)")["base"][0].startswith("0.700 100 % parse")
    entry = data["tables"][0]["rows"][3]["entries"][0]
    assert (entry["interval_95"], entry["p"]) == (None, 1)


def test_a_test_without_any_entry(tmp_path: Path) -> None:
    results = made(settings_of(), ["calibration-size"], steady(20, 24), layout=layout_for(settings_of(), 6))
    markdown, _, _ = written(tmp_path, results)
    table = rows_of(markdown, "How many calibration examples (table calibration-size)")
    assert all(table[size] == ["–", "–"] for size in ("10", "50", "500"))
    assert "No two arms were compared." in markdown


def test_contrasts_stand_below_the_table(tmp_path: Path) -> None:
    def right(cell: Cell, seed: int) -> str:
        return ("1" * {"base": 20, "self-training": 21, "spd": 26}.get(cell.arm, 20)).ljust(N, "0")

    markdown, data, page = written(tmp_path, made(settings_of(), ["1"], right))
    line = "spd against self-training: words +12.5 points, p .062."
    assert line in markdown and line in page
    found = [(each["row"], each["against"], each["difference"], each["p"]) for each in data["tables"][0]["contrasts"]]
    assert found[0] == ("spd", "self-training", 12.5, 2 / 32)


def test_markdown_and_data_say_the_same(tmp_path: Path) -> None:
    names = [name for name in TABLES if name != "learning-rate"]
    settings = settings_of(domains=["code", "choice"], seeds=[1, 2])
    markdown, data, page = written(tmp_path, made(settings, names, by_chance(0.12)))
    seen = 0
    for table in data["tables"]:
        shown = rows_of(markdown, f"{table['title']} (table {table['table']})")
        for row in table["rows"]:
            cells = [cell for cell in shown[row["label"]][:-1] if "[" in cell]
            entries = [entry for entry in row["entries"] if entry]
            assert len(cells) == len(entries)
            for cell, entry in zip(cells, entries, strict=True):
                value, low, high = re.match(r"[*]*([\d.]+)[*▾]* \[([\d.]+), ([\d.]+)\]", cell).groups()  # type: ignore[union-attr]
                assert float(value) == pytest.approx(entry["value"], abs=0.051)
                assert [float(low), float(high)] == pytest.approx(entry["interval_95"], abs=0.51)
                right = entry["value"] / 100 * entry["n"]
                assert entry["interval_95"] == pytest.approx([100 * end for end in wilson_interval(right, entry["n"])])
                assert ("**" in cell, "▾" in cell) == (entry["verdict"] == "better", entry["verdict"] == "worse")
                assert (" p " in cell) == (entry["p"] is not None)
                assert cell.split(" [")[0].strip("*▾") in page
                seen += 1
        ps = [entry for row in table["rows"] for entry in row["entries"] if entry and entry["p"] is not None]
        assert [entry["adjusted_p"] for entry in ps] == holm([entry["p"] for entry in ps])
    assert seen > 100


# What is said


def test_the_conclusion_counts_each_comparison_once(tmp_path: Path) -> None:
    def right(cell: Cell, seed: int) -> str:
        return ("1" * (32 if cell.arm == "spd" else 20)).ljust(N, "0")

    markdown, data, page = written(tmp_path, made(settings_of(), ["1", "3", "4"], right))
    # table 1: three arms; table 3: projected twice and spd on words-ood; table 4: spd:loss=full
    said = "Of 7 comparisons of an arm with its table's row of comparison, each counted once, 2 differ beyond chance:"
    assert said in markdown and said in page.replace("&#39;", "'")
    assert data["conclusion"]["beyond"] == [
        "spd on words 30.0 points better than base (Holm .001, table 1)",
        "spd on words-ood 30.0 points better than base (Holm .002, table 3)",
    ]
    assert all(f"- {each}" in markdown for each in data["conclusion"]["beyond"])
    assert "2 of them have p < .05, where chance alone is expected to show at most 1." in markdown
    assert "and not table by table, 2 would remain." in markdown


def test_nothing_beyond_chance_is_said_plainly(tmp_path: Path) -> None:
    markdown, data, _ = written(tmp_path, made(settings_of(), ["1"], steady(20, 22)))
    assert "each counted once, none differs beyond chance." in markdown
    assert data["conclusion"]["beyond"] == []
    assert "Before any adjustment none of them has p < .05" in markdown


def test_negative_transfer_is_flagged(tmp_path: Path) -> None:
    def right(cell: Cell, seed: int) -> str:
        lost = cell.capability == "words" and cell.arm == "spd" and cell.test == "code"
        return ("1" * (8 if lost else 20)).ljust(N, "0")

    settings = settings_of(domains=["code", "math"])
    markdown, data, _ = written(tmp_path, made(settings, ["transfer"], right))
    table = rows_of(markdown, "Negative transfer")
    assert table["spd for math"] == ["2", "code▾", "code −30.0 points p < .001, Holm < .001"]
    assert table["spd for code"] == ["2", "none", "no fall"]
    assert "Negative transfer in 1 of 8 checks: spd for math on code." in markdown
    flagged = [
        (row["label"], test["task"]) for row in data["negative_transfer"] for test in row["tests"] if test["fell"]
    ]
    assert flagged == [("spd for math", "code")]


def test_no_negative_transfer_is_said_plainly(tmp_path: Path) -> None:
    settings = settings_of(domains=["code", "math"])
    markdown, _, _ = written(tmp_path, made(settings, ["transfer"], steady(20, 18)))
    assert "No negative transfer: in 8 checks, no fall beyond chance." in markdown
    assert rows_of(markdown, "Negative transfer")["spd for code"][2] == "words −5.0 points p .50, Holm 1"


def test_negative_transfer_of_nll_is_a_rise() -> None:
    settings = settings_of("paper", ["code", "math"])
    layout = layout_for(settings)

    def outcomes(cell: Cell) -> Outcomes:
        if cell.test == "codealpaca":
            worse = 0.05 if cell.capability == "gsm8k" else -0.05 if cell.capability else 0.0
            return Outcomes("nll", [[None] * 8], [[1.0 + worse * (1 + text % 2) for text in range(8)]], 0.0, 0)
        return Outcomes("accuracy", [[True, False] * 4], [[]], 0.0, 0)

    found = {cell: outcomes(cell) for cell in cells_of([TABLES["transfer"]], layout)}
    flagged = negative_transfer(summarise(TABLES["transfer"], layout, found), found)
    assert [(row.label, [change.task for change in tested if change.fell]) for row, tested in flagged] == [
        ("self-training for code", []),
        ("self-training for math", ["codealpaca"]),
        ("spd for code", []),
        ("spd for math", ["codealpaca"]),
    ]
    assert all(
        change.change == pytest.approx(-0.075) for _, t in flagged for change in t if change.task == "codealpaca"
    )


def test_perplexity_is_compared_text_by_text() -> None:
    arms = {"base": perplexity([0.0, 5.0, 1.0]), "spd": perplexity([0.2, 5.2, 1.2]), "ssd": perplexity([0.2, 4.8, 1.0])}
    spd, ssd = off_target({"words": {"perplexity": arms}})
    assert spd.ratio == pytest.approx([math.exp(0.02)] * 3)  # every text by the same: an interval of no width
    assert (spd.p, spd.verdict) == (0.0, "worse") or spd.p < 1e-6
    assert ssd.ratio[0] == pytest.approx(1.0) and ssd.p == pytest.approx(1.0) and ssd.verdict == ""
    assert spd.adjusted == 2 * spd.p


def test_diagnostics_have_their_tables(tmp_path: Path) -> None:
    arms = ["spd", "self-training", "spd:rounds=2", "spd:rounds=3", "spd:subspace=random"]
    results = made(settings_of(), ["rounds", "controls"], steady(20, 22), diagnostics={"words": diagnosed(arms)})
    markdown, data, page = written(tmp_path, results)
    (lines,) = [part for part in markdown.split("\n## ") if part.startswith("Does what projection does survive")]
    assert "| words | spd | 100 [50, 200] | 100 [50, 200] | 10.0 [−10.0, 20.0] | – |" in lines
    assert "| 10.0 [5.0, 20.0] | 7.500 [3.750, 15.000] | 1.000 [−1.000, 2.000] | 25 [15, 35] |" in lines
    neutral = rows_of(markdown, "Neutral text")
    assert neutral["base"] == ["2.718 [2.446, 2.990]"]
    assert neutral["self-training"][0].startswith("2.723▾ +0.19 % [")
    assert list(neutral)[2:] == ["base", "self-training", "spd", "spd:rounds=2", "spd:rounds=3", "spd:subspace=random"]
    drift = rows_of(markdown, "Drift over rounds")
    assert drift["site"] == ["words, round 1", "words, round 2", "words, round 3"]
    assert drift["its own test"] == ["55.0 [40, 69]"] * 3
    assert drift["layer 3 V"] == ["–", "0.800", "0.600"] and drift["by chance"] == ["–", "0.500", "0.500"]
    assert data["drift"]["words"]["spd:rounds=3"][1]["overlap"]["layer 3 K"] == 0.7
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"shift", "perplexity", "table-rounds"}
    assert page.count("<svg") == 4


def test_without_diagnostics_there_are_no_such_parts(tmp_path: Path) -> None:
    markdown, data, _ = written(tmp_path, made(settings_of(), ["1"], steady(20, 22)))
    for part in ("Does what projection", "Neutral text", "Drift over rounds", "Negative transfer"):
        assert part not in markdown
    assert (data["perplexity"], data["shift"], data["drift"], data["negative_transfer"]) == ([], {}, {}, [])


def test_the_head_says_what_it_was_made_with(tmp_path: Path) -> None:
    environment = {
        "device": "a machine",
        "dtype": "float32",
        "parameters": 2_400_000,
        "system": "Linux",
        "versions": {"torch": "2.13"},
    }
    write_json(tmp_path / "environment.json", [environment])
    markdown, _, page = written(tmp_path, made(settings_of(seeds=[5, 6]), ["1"], steady(20, 22)))
    for line in ("2.4 M parameters, float32", "a machine; torch 2.13", "5, 6;", "learning rate 1e-05", "50 of words"):
        assert line in markdown and line in page
    assert "\n\n    spd reproduce\n" in markdown and "<code>spd reproduce</code>" in page


def test_without_a_stored_layout_the_tasks_are_asked(tmp_path: Path) -> None:
    settings = settings_of()
    results = made(settings, ["calibration-size"], steady(20, 22), layout=layout_of(settings))
    with_layout = written(tmp_path / "a", results)
    del results["layout"]
    assert written(tmp_path / "b", results) == with_layout


def test_text_of_others_is_escaped_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>/a|b*c_d"
    results = made(settings_of(model=name), ["1"], steady(20, 22)) | {"command": "spd reproduce -m '<b>'"}
    markdown, data, page = written(tmp_path, results)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;b&gt;" in page
    assert "\\<script>alert(1)\\</script>/a\\|b\\*c_d" in markdown
    assert data["settings"]["model"] == name
    for forbidden in ("<script", "<link", "<img", "<iframe", "@import", "url(http", "src="):
        assert forbidden not in page
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert set(re.findall(r'id="(table-[^"]+)"', page)) >= {"table-1"}


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (1.0, "p 1"),
        (0.996, "p 1"),
        (0.31, "p .31"),
        (0.0123, "p .012"),
        (0.0499, "p .049"),
        (0.05, "p .050"),
        (9e-4, "p < .001"),
    ],
)
def test_p_is_short_and_never_rounded_across_the_level(p: float, shown: str) -> None:
    assert p_text(p) == shown


def test_signs() -> None:
    assert (signed(0.04, 1), signed(-0.04, 1), signed(0.5, 1), signed(-12.34, 1)) == ("0.0", "0.0", "+0.5", "−12.3")
    assert (points(0.5, "accuracy"), points(-0.0042, "nll")) == ("+0.5 points", "−0.004 nats")


# The figures


def summary_of(name: str, settings: ReproduceSettings, chance: float = 0.2) -> tuple[Any, dict[str, Outcomes]]:
    layout, right = layout_for(settings), by_chance(chance)

    def outcomes(cell: Cell) -> Outcomes:
        seeds = settings.seeds if parse_arm(cell.arm).trained else [0]
        verdicts: list[list[bool | None]] = [[mark == "1" for mark in right(cell, seed)] for seed in seeds]
        rng = random.Random(str(cell))
        nlls = [[rng.gauss(0.7, 0.1) for _ in range(N)] for _ in seeds]
        return Outcomes("nll" if cell.test == "codealpaca" else "accuracy", verdicts, nlls, 0.1, 0)

    found = {cell: outcomes(cell) for cell in cells_of([TABLES[name]], layout)}
    return summarise(TABLES[name], layout, found), {c.test: each for c, each in found.items() if c.capability is None}


def check_layout(figure: Any) -> None:
    """No label over another, no legend over a panel, and all of it within the figure."""
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    labels = []
    for axis in figure.axes:
        ticks = [
            tick.label2 if axis.xaxis.get_ticks_position() == "top" else tick.label1
            for tick in axis.xaxis.get_major_ticks()
        ]
        low, high = sorted(axis.get_xlim())
        names = [t for t, at in zip(ticks, axis.get_xticks(), strict=True) if low <= at <= high]
        boxes = [label.get_window_extent() for label in names if label.get_text()]
        assert boxes and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        rows = [t.get_window_extent() for t in axis.get_yticklabels() if t.get_text() and t.get_visible()]
        assert not any(a.overlaps(b) for a, b in combinations(rows, 2))
        labels += [axis.title, axis._left_title]
        labels += [axis.xaxis.label, axis.yaxis.label]
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1 for box in boxes)
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_every_table_has_a_figure() -> None:
    assert set(figures.OF_TABLE) == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_labels_do_not_overlap(name: str) -> None:
    everything = ["code", "math", "choice"]
    cases = [("proving-ground", ["math"]), ("proving-ground", everything)]
    if name in (
        "2",
        "4",
        "transfer",
        "rank",
    ):  # one of each kind, with published values and an NLL column where it has one
        cases += [("paper", ["math"]), ("paper", everything)]
    for suite, domains in cases:
        summary, base = summary_of(name, settings_of(suite, domains))
        check_layout(figures.OF_TABLE[name](summary, base, suite == "paper"))


def test_labels_of_the_diagnostics_do_not_overlap() -> None:
    arms = [row.arm for name in ("controls", "rounds") for row in TABLES[name].rows if row.arm != "base"]
    order = {arm: place for place, arm in enumerate(arms)}
    for capabilities in (["words"], ["code", "words", "choice"]):
        found = {each: diagnosed(list(order)) for each in capabilities}
        check_layout(figures.shift_figure(found, order))
        check_layout(figures.perplexity_figure(off_target(found), order))


def test_figures_are_written_and_stand_in_the_page(tmp_path: Path) -> None:
    names = ["1", "4", "5", "rank"]
    markdown, _, page = written(tmp_path, made(settings_of(), names, by_chance(0.1)))
    for name in names:
        content = (tmp_path / "figures" / f"table-{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
        assert f"(figures/table-{name}.png)" in markdown
    assert page.count("<svg") == page.count("<figure") == len(names)
    assert not list(tmp_path.rglob("*.tmp"))


def test_published_values_are_drawn_for_the_papers_data_only() -> None:
    for suite, drawn in (("proving-ground", False), ("paper", True)):
        for name in ("1", "4", "rank"):
            summary, base = summary_of(name, settings_of(suite))
            figure = figures.OF_TABLE[name](summary, base, suite == "paper")
            (legend,) = figure.legends
            assert ("published" in [text.get_text() for text in legend.get_texts()]) == drawn


def test_a_matrix_outlines_what_is_beyond_chance() -> None:
    settings = settings_of(domains=["code", "math"])
    layout = layout_for(settings)

    def outcomes(cell: Cell) -> Outcomes:
        right = 38 if cell.capability == "code" and cell.arm == "spd" and cell.test == "words" else 20
        return Outcomes("accuracy", [[index < right for index in range(N)]], [[]], 0.0, 0)

    found = {cell: outcomes(cell) for cell in cells_of([TABLES["transfer"]], layout)}
    summary = summarise(TABLES["transfer"], layout, found)
    (axis,) = figures.matrix_figure(summary, {}, False).axes
    outlined = [patch for patch in axis.patches if patch.get_linewidth() > 2]
    assert [(patch.get_center()[0], patch.get_center()[1]) for patch in outlined] == [pytest.approx((1, 2))]
    assert sum(text.get_text() == "+45.0" for text in axis.texts) == 1
    assert conclude([summary]).beyond == [
        "spd for code on words 45.0 points better than base (Holm < .001, table transfer)"
    ]
