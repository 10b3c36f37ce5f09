"""Pages and Markdown about models and records that hold markup: it is shown, and never is any."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import EXAMPLES, NASTY_TEXT, Tally, fuzzed, places, replaced
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile_subspace import METRICS, PROVENANCE
from test_reproduce_report import diagnosed, made, settings_of, steady
from transformers import PreTrainedTokenizerFast

import spd
from spd.explorer import TokenGradients, explore, read_metrics
from spd.files import write_json
from spd.hub import model_card
from spd.long_context.report import write_report as long_context_report
from spd.report import write_report
from spd.reproduce.report import write_report as reproduce_report
from spd.span_preview import preview, preview_html

HOSTILE = [
    "<script>alert(1)</script></pre></td></table></style></title></script><img src=x onerror=alert(1)>"
    "\" onmouseover=\"alert(1)\" ' onfocus='a' <a href=javascript:alert(1)>x</a>--><!--<![CDATA[</svg><iframe>]]>"
    "&lt;b&gt;&#60;b&#62;{{ 7 * 7 }}{% if %}",
    "$\\frac{1}{$ $x^$_",
    "_\x1b[31m\0\x85\u2028\u202e<b>\ufeff",
]
"""Elements, ends of attributes and of elements, templates, mathematics of matplotlib, controls."""


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Any:
    counted = Tally(request.node.name)
    yield counted
    counted.write()


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.values: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("srcdoc", "formaction", "background"), (tag, name)
            if name in ("href", "xlink:href", "src", "action", "data"):
                assert re.fullmatch(r"#[\w-]+|data:image/png;base64,[\w+/=\s]+", value or ""), (tag, name, value)
            self.values.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        assert not set(data) & {"<", ">"}, f"matplotlib's comments repeat what a label says, escaped: {data!r}"

    @property
    def text(self) -> str:
        return "".join(self.words)


def check(page: str) -> Page:
    """Nothing on it can run, load, or leave: whatever else there is on it is text."""
    parsed = Page(page)
    names = {name for name, _ in parsed.elements}
    forbidden = {"script", "iframe", "object", "embed", "link", "base", "form", "input", "img", "audio", "video", "a"}
    assert not names & (forbidden - {"a"}), names & forbidden
    controls = {each for each in page if ord(each) < 32 and each not in "\n\t"} | set(page) & set("\u202e\u2066\x85")
    assert not controls, controls
    return parsed


def with_text(value: Any, text: str) -> Any:
    """A value with every text in it, names of fields aside, replaced or added to."""
    if isinstance(value, dict):
        return {key: with_text(each, text) for key, each in value.items()}
    if isinstance(value, list):
        return [with_text(each, text) for each in value]
    return text if isinstance(value, str) else value


def basis(seed: int) -> spd.Basis:
    u, s, _ = torch.linalg.svd(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return spd.Basis(u[:, :4].float().contiguous(), s)


def subspace_with(provenance: dict[str, Any]) -> spd.Subspace:
    return spd.Subspace({1: basis(0), 3: basis(1)}, {1: basis(2), 3: basis(3)}, provenance)


ORIGIN = {"examples": 9, "target_tokens": 50, "rows": 700, "examples_without_span": [3], "spans_cut": 1}


def run_folder(folder: Path, text: str) -> Path:
    """A run with this text wherever a record, a model or a machine puts one, names of folders included."""
    name = text.replace("/", "").replace("\0", "")[:60]
    origin = ORIGIN | {"straddling_tokens": text, "model": text, "settings": {"max_length": text, "loss": text}}
    subspace_with(origin).save_pretrained(folder / name / "subspace")
    config = {
        "model": text,
        "tasks": [name],
        "arms": ["base", "spd"],
        "data": text,
        "training": {text: text},
    }
    write_json(folder / "config.json", config)
    score = {"n": 2, "correct": 1, "accuracy": 0.5, "interval_95": [0.1, 0.9], "task": name}
    write_json(
        folder / "metrics.json",
        [score | {"capability": None, "arm": "base"}, score | {"capability": name, "arm": "spd"}],
    )
    machine = {"device": text, "dtype": text, "parameters": 5, "system": text, "versions": {text: text}}
    write_json(folder / "environment.json", [machine, machine])
    write_json(folder / "timings.json", {text: 1.0})
    scored = {"prompt": f"{text} asks", "completion": f"{text} says", "correct": True}
    for where in ("base/evaluations", f"{name}/evaluations/spd"):
        path = folder / where / f"{name}.scored.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{json.dumps(scored)}\n{json.dumps(scored | {'correct': None})}\n")
    training = {"loss": [{"step": 1, "loss": 2.0}], "examples": 2, "tokens": 9}
    write_json(folder / name / "adapters" / name / "training.json", training)
    write_json(folder / name / "prompts.json", {"prompts": 5, "too_long": [1]})
    return folder


@pytest.fixture(scope="module")
def innocent(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return check(write_report(run_folder(tmp_path_factory.mktemp("run"), "innocent")).read_text())


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_report_of_a_run(text: str, innocent: Page, tmp_path: Path, tally: Tally) -> None:
    path = tally.attempt(write_report, run_folder(tmp_path, text))
    page = check(path.read_text())
    in_figures = {"path", "use", "g", "text", "defs", "clippath", "rect", "svg", "style", "metadata"}
    kept = [each for each in page.elements if each[0] not in in_figures]
    assert kept == [each for each in innocent.elements if each[0] not in in_figures]
    if text.isprintable():
        assert f"{text} asks" in page.text and f"{text} says" in page.text and f"{text} · 5 parameters" in page.text


@settings(fuzzed, max_examples=max(4, EXAMPLES // 4))  # a page takes a second
@given(data=st.data())
def test_report_of_an_altered_run(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> None:
    folder = run_folder(tmp_path_factory.mktemp("run"), "innocent")
    path = data.draw(st.sampled_from(sorted(folder.rglob("*.json"))))
    value = json.loads(path.read_text())
    if path.name != "subspace.json":
        place = data.draw(st.sampled_from(places(value)))
        write_json(path, replaced(value, place, data.draw(st.sampled_from([None, 5, "x", [], {}, 1e400, *HOSTILE]))))
    written = tally.attempt(write_report, folder)
    if written is not None:
        check(written.read_text())


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_explorer(text: str, tmp_path: Path, tally: Tally) -> None:
    provenance = with_text(PROVENANCE, text) | {text: {text: [text, {text: text}]}}
    base, tuned = METRICS
    rows = [base | {"task": text}, tuned | {"arm": text, "capability": text, "task": text}]
    write_json(tmp_path / "metrics.json", rows)
    shown = f"{text} q"
    tokens = TokenGradients(0, shown, 2, [(0, 2), (2, len(shown))], [1], {("k", 1): [1.0, 2.0], ("v", 1): [1.0, 0.0]})
    page = tally.attempt(
        explore,
        {text: subspace_with(provenance), f"{text}2": subspace_with(provenance | {"config_sha256": text + "2"})},
        tokens=[tokens],
        metrics=read_metrics(tmp_path),
        tokens_of=text,
        title=text,
    )
    parsed = check(page)
    assert parsed.elements.count(("title", ())) >= 1
    if text.isprintable():
        assert parsed.text.count(text) >= 6


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_preview_of_spans(text: str, tokenizer: PreTrainedTokenizerFast, tally: Tally) -> None:
    example = spd.Example(f"{text} q\n", f" {text}", [(0, 3), (len(text) + 3, len(text) + 5)])
    shown = preview(tokenizer, [example], max_length=16)
    page = check(tally.attempt(preview_html, shown, title=text))
    if text.isprintable():
        assert page.text.count(text) >= 2
    own = "html head meta title style body h1 h2 p div span mark section pre i"
    assert {name for name, _ in page.elements} <= set(own.split())


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_report_of_a_reproduction(text: str, tmp_path: Path, tally: Tally) -> None:
    asked = settings_of(model=text, data=text, neutral=text)
    results = made(asked, ["1"], steady(20, 24), diagnostics={"words": diagnosed(["spd"])})
    write_json(tmp_path / "results.json", results | {"command": f"spd reproduce {text}"})
    machine = {"device": text, "dtype": text, "parameters": 5, "versions": {text: text}}
    write_json(tmp_path / "environment.json", [machine])
    tally.attempt(reproduce_report, tmp_path)
    page = check((tmp_path / "report.html").read_text())
    if text.isprintable():
        assert page.text.count(text) >= 4
    check_markdown((tmp_path / "tables.md").read_text(), text)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_report_of_long_contexts(text: str, tmp_path: Path, tally: Tally) -> None:
    machine = {"device": text, "dtype": text, "parameters": 5, "attention": text, "versions": {text: text}}
    asked = {"model": text, "shape": None, "subspace": text, "decode_rank": 2, "batch": 1, "tokens": 2, "rounds": 2}
    modes = {
        "unprojected": {"bytes": 10, "seconds": [1.0, 2.0], "peak_bytes": None},
        "fold": {"refused": text},
    }
    cells = {"decode/64": {"context": 64, "modes": modes}}
    write_json(tmp_path / "results.json", {"settings": asked, "environments": [machine], "cells": cells})
    path = tally.attempt(long_context_report, tmp_path)
    check_markdown(path.read_text(), text)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_model_card(text: str, tmp_path: Path, tally: Tally) -> None:
    write_json(tmp_path / "metrics.json", [row | {"arm": row["arm"] and text, "task": text} for row in METRICS[1:]])
    provenance = with_text(PROVENANCE, text) | {"examples": text, text: text}
    card = tally.attempt(model_card, subspace_with(provenance), "u/n", license=text, metrics=read_metrics(tmp_path))
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert [line for line in header.splitlines() if line.startswith("license:")]
    body, fence, quoted = body.rpartition("\n```json\n")
    assert fence and quoted.count("\n```") == 1, "the provenance stays inside its fence"
    check_markdown(body, text)


def check_markdown(content: str, text: str) -> None:
    """No element begins in it, nor a link, and its tables keep their cells."""
    flowing = "\n".join(line for line in content.split("\n") if not line.startswith("    "))  # what is indented is code
    unescaped = flowing.replace("\\\\", "").replace("\\<", "").replace("\\[", "").replace("\\`", "")
    for mark in ("<script", "<img", "<svg", "<iframe", "<!--", "</pre", "<b>"):
        assert mark not in unescaped, mark
    assert text not in ("_hidden",) or "hidden" in content
    assert not {each for each in content if ord(each) < 32 and each not in "\n\t"}


def test_any_text_on_the_page_of_a_run(tmp_path: Path, tally: Tally) -> None:
    """Prompts and completions hold what no name can."""
    folder = run_folder(tmp_path, "innocent")
    text = "|".join(NASTY_TEXT)
    scored = {"prompt": text, "completion": f"{text}\U0001f600", "correct": False}
    for path in folder.rglob("*.scored.jsonl"):
        path.write_text(f"{json.dumps(scored)}\n")
    page = check(tally.attempt(write_report, folder).read_text())
    assert "|[red]x[/red]|[link=x]|<script>alert(1)</script>|{{ 7 * 7 }}|$\\frac$|%s%n|" in page.text
