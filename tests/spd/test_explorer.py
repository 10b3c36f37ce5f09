"""The explorer: numbers against their definitions, and a page that holds everything and lets nothing in or out."""

import html
import json
import math
import re

import pytest
import torch

import spd
from spd.explorer import (
    explore,
    explore_json,
    pairs,
    read_metrics,
    read_subspaces,
    token_gradients,
    write_figures,
)
from spd.explorer.figures import figures
from spd.explorer.numbers import between_layers, cumulative_energy, shares, sites
from spd.explorer.page import LEVELS, pieces
from spd.subspace import Basis, Subspace

HOSTILE = "<script>alert('$x$')</script>&\u202e"


def made(layers=(0, 1), d=16, r=8, seed=0, **provenance):
    generator = torch.Generator().manual_seed(seed)

    def basis():
        u = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
        return Basis(u[:, :r].contiguous(), torch.logspace(0, -4, d, dtype=torch.float64))

    return Subspace({at: basis() for at in layers}, {at: basis() for at in layers}, provenance)


def body_text(page):
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)))


def assert_self_contained(page):
    assert "<script" not in page and "<iframe" not in page and "<object" not in page and "<link" not in page
    assert not re.search(r"\son\w+\s*=", re.sub(r">[^<]*<", "><", page)), "no handlers"
    for where in re.findall(r'(?:href|src)\s*=\s*"([^"]*)"', page):
        assert where.startswith(("#", "data:image/png;base64,")), where
    assert not re.search(r"@import|url\((?!#)", page), "nothing from elsewhere"


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which takes a second a page: where a test is about the rest of it."""
    monkeypatch.setattr("spd.explorer.page.svg_text", lambda figure: "<svg></svg>")


@pytest.fixture(scope="module")
def gradients(make_model, tokenizer, examples):
    return token_gradients(make_model("qwen2"), tokenizer, examples[:6], "all", batch_size=4, progress=False)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_token_gradients_are_the_rows_that_calibration_sums_up(make_model, tokenizer, examples, family):
    """Without centring, sum_i sigma_i^2 = ||G||_F^2 = the sum of the squared norms of its rows."""
    model = make_model(family)
    found = token_gradients(model, tokenizer, examples, "all", batch_size=3, progress=False)
    subspace = spd.calibrate(model, tokenizer, examples, layers="all", center=False, progress=False)
    assert [each.index for each in found] == list(range(len(examples)))
    for layer in subspace.layers:
        for side in "kv":
            expected = float(subspace.side(side)[layer].singular_values.square().sum())
            squares = math.fsum(norm**2 for each in found for norm in each.norms[side, layer])
            assert squares == pytest.approx(expected, rel=1e-4)
            assert expected > 0


def test_token_gradients_do_not_depend_on_the_batch_and_leave_the_model_alone(make_model, tokenizer, examples):
    model = make_model("qwen3").train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    one = token_gradients(model, tokenizer, examples[:5], "paper", batch_size=1, progress=False)
    all_at_once = token_gradients(model, tokenizer, examples[:5], "paper", batch_size=8, progress=False)
    for a, b in zip(one, all_at_once, strict=True):
        assert a.offsets == b.offsets and len(a.total("k")) == len(a.offsets)
        for key in a.norms:
            assert b.norms[key] == pytest.approx(a.norms[key], rel=1e-3, abs=1e-7)
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_comes_after_the_last_target_has_no_gradient(gradients):
    """K and V of a token act on later predictions only, so from the last target on there is nothing."""
    for each in gradients:
        last = max(each.counted)
        assert all(norm == 0.0 for side in "kv" for norm in each.total(side)[last:])
        assert any(norm > 0.0 for norm in each.total("v")[:last])


def test_token_gradients_of_half_precision(make_model, tokenizer, examples):
    model = make_model("qwen2")
    exact = token_gradients(model, tokenizer, examples[:3], "last", progress=False)
    rounded = token_gradients(model.half(), tokenizer, examples[:3], "last", progress=False)
    for a, b in zip(exact, rounded, strict=True):
        assert b.total("v") == pytest.approx(a.total("v"), rel=0.1, abs=0.05 * max(a.total("v")))


def test_token_gradients_refuse_what_has_none(model, tokenizer, examples):
    with pytest.raises(spd.InputError, match="none of the 1 has a token in S"):
        token_gradients(model, tokenizer, [spd.Example("a", "b")], progress=False)
    with pytest.raises(spd.InputError, match='loss: expected "spans" or "full"'):
        token_gradients(model, tokenizer, examples, loss="all", progress=False)
    with pytest.raises(spd.InputError, match="batch_size: expected an integer"):
        token_gradients(model, tokenizer, examples, batch_size=0, progress=False)


def test_pieces_are_the_text_and_the_largest_norm_is_the_darkest(gradients, model, tokenizer):
    for each in gradients:
        for side in "kv":
            found = pieces(each, side)
            assert "".join(piece.text for piece in found) == each.text
            assert max(piece.level for piece in found) == LEVELS
            assert any(piece.counted for piece in found)
    example = spd.Example("q\U0001f642\U0001f642 ", "x\U0001f642\n", [(4, 6)])
    (emoji,) = token_gradients(model, tokenizer, [example], progress=False)
    assert len(emoji.offsets) > len(pieces(emoji, "k")), "a character of several tokens is one piece"
    assert "".join(piece.text for piece in pieces(emoji, "k")) == example.text


def test_shares_add_up(gradients):
    for side in "kv":
        found = shares(gradients, side)
        assert math.fsum(part["share"] for part in found["parts"].values()) == pytest.approx(1.0)
        counted = sum(part["tokens"] for part in found["parts"].values())
        assert counted == sum(len(each.offsets) for each in gradients)
        assert found["parts"]["S"]["tokens"] == sum(len(each.counted) for each in gradients)
        assert 0 < found["half"] <= 0.5


def test_layers_overlap_as_their_bases_do():
    subspace = made(layers=(0, 3), r=5)
    overlap = between_layers(subspace)
    for i, (side, layer) in enumerate(sites(subspace)):
        for j, (other_side, other_layer) in enumerate(sites(subspace)):
            a, b = subspace.side(side)[layer].basis, subspace.side(other_side)[other_layer].basis
            assert float(overlap[i, j]) == pytest.approx(float((a.T @ b).square().sum()) / 5, abs=1e-5)
    wider = Subspace({0: subspace.k[0], 1: made(d=24).k[0]}, {0: subspace.v[0], 1: made(d=24).v[0]})
    assert between_layers(wider).isnan().sum() == 8, "sites of two widths do not compare"


def test_energy_is_what_the_basis_says():
    basis = made(r=6).k[0]
    assert float(cumulative_energy(basis)[5]) == pytest.approx(basis.energy())
    assert float(cumulative_energy(basis)[-1]) == pytest.approx(1.0)


def test_folders_are_named_by_what_tells_them_apart(tmp_path):
    for where in ("run/words/subspace", "run/code/subspace", "other/code/subspace", "single"):
        made(model=where).save_pretrained(tmp_path / where)

    def names(*folders):
        return list(read_subspaces([tmp_path / folder for folder in folders]))

    assert names("run/words/subspace", "single") == ["words", "single"]
    assert names("run/code/subspace", "other/code/subspace") == ["run/code", "other/code"]
    assert read_subspaces([tmp_path / "single"])["single"].provenance["model"] == "single"
    with pytest.raises(spd.InputError, match="named twice"):
        names("single", "run/../single")
    with pytest.raises(spd.InputError, match="not a subspace folder"):
        names("run")


def test_pairs_that_cannot_be_compared_say_why(undrawn):
    one, other = made(config_sha256="a" * 64, model="one"), made(config_sha256="b" * 64, model="other")
    apart = made(layers=(5,), config_sha256="a" * 64, model="one")
    found = pairs({"one": one, "other": other, "apart": apart})
    assert len(found) == 3 and all(pair.refused and not pair.sites for pair in found)
    page = explore({"one": one, "other": other, "apart": apart})
    assert page.count("are not compared") == 3
    assert "Overlap between subspaces" not in page


@pytest.mark.parametrize(("count", "layers"), [(1, 1), (3, 2), (2, 32)])
def test_a_page_of_any_size(count, layers):
    subspaces = {f"subspace {n}": made(range(layers), seed=n, model=f"model {n}") for n in range(count)}
    page = explore(subspaces, title="Three & more")
    assert_self_contained(page)
    text = body_text(page)
    assert "Three & more" in text and all(name in text for name in subspaces)
    assert text.count("layer ") >= 2 * layers, "every site has its row"
    assert ("Between subspaces" in text) == (count > 1)
    assert page.count("<svg") == (3 if count == 1 else 5)
    assert len(page) < 3e6


@pytest.mark.parametrize(("count", "layers"), [(1, 1), (3, 4), (2, 32)])
def test_nothing_overlaps_in_a_figure(count, layers):
    subspaces = {f"a long name of subspace {n}": made(range(layers), seed=n) for n in range(count)}
    for name, figure in figures(subspaces, pairs(subspaces)).items():
        figure.draw_without_rendering()
        boxes = [axis.get_tightbbox() for axis in figure.axes]
        for number, box in enumerate(boxes):
            crossing = [other for other in boxes[:number] if box.padded(-1).overlaps(other.padded(-1))]
            assert not crossing, name
            assert box.x0 >= -2 and box.x1 <= figure.bbox.width + 2, name
            assert box.y0 >= -2 and box.y1 <= figure.bbox.height + 2, name


def test_the_rank_cut_is_where_the_basis_ends():
    subspace = made(layers=(2,), r=5)
    drawn = figures({"one": subspace}, [])
    assert set(drawn) == {"spectra", "energy", "layers"}
    (dot,) = (line for line in drawn["energy"].axes[0].lines if line.get_marker() == "o")
    assert list(dot.get_xdata()) == [5]
    assert float(dot.get_ydata()[0]) == pytest.approx(100 * subspace.k[2].energy())


def test_a_derived_subspace_has_no_spectra(undrawn):
    one, other = made(seed=1), made(seed=2)
    derived = one.complement()
    assert set(figures({"rest": derived}, [])) == {"layers"}
    page = explore({"one": one, "other": other, "rest": derived})
    assert "was made by complement of others" in body_text(page)
    sites_of = explore_json({"rest": derived})["subspaces"]["rest"]["sites"]
    assert len(sites_of) == 4 and not any("singular_values" in site for site in sites_of)
    assert "<h2>Spectra" not in explore({"rest": derived})


def test_strangers_cannot_drive_the_page(model, tokenizer):
    example = spd.Example(f"{HOSTILE}\n\x1b[31m", f" {HOSTILE} 12", [(1, 4)])
    tokens = token_gradients(model, tokenizer, [example], progress=False)
    subspaces = {HOSTILE: made(model=HOSTILE, note={HOSTILE: [HOSTILE]}), f"{HOSTILE}2": made(seed=3)}
    scores = [
        {"capability": None, "arm": "base", "task": HOSTILE, "n": 4, "accuracy": 0.5, "interval_95": [0.2, 0.8]},
        {"capability": HOSTILE, "arm": HOSTILE, "task": HOSTILE, "n": 4, "accuracy": 0.6, "interval_95": [0.2, 0.8]},
    ]
    page = explore(subspaces, tokens=tokens, metrics=spd.explorer.numbers.transfer(scores), title=HOSTILE)
    assert_self_contained(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert body_text(page).count("<script>alert") >= 8


def test_tokens_are_shown_with_their_strength(gradients, undrawn):
    page = explore({"one": made()}, tokens=gradients, tokens_of="six <examples>")
    assert "six &lt;examples&gt;" in page
    assert_self_contained(page)
    shown = [html.unescape(re.sub(r"<[^>]+>", "", each)) for each in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
    assert [text.replace("↵", "") for text in shown] == [each.text for each in gradients for _ in "kv"]
    assert re.search(rf'class="t k{LEVELS}[ "]', page) and re.search(rf'class="t v{LEVELS}[ "]', page)


def test_scores_of_a_run(tmp_path, undrawn):
    base = {"capability": None, "arm": "base", "task": "sums", "n": 50, "accuracy": 0.4, "interval_95": [0.3, 0.5]}
    better = base | {"capability": "sums", "arm": "spd", "accuracy": 0.6, "interval_95": [0.5, 0.7]}
    likely = {"capability": None, "arm": "base", "task": "code", "nll": 1.5, "nll_interval_95": [1.4, 1.6], "nll_n": 30}
    worse = likely | {"capability": "sums", "arm": "spd", "nll": 1.75}
    both = [each | {"n": 50, "accuracy": each.get("accuracy")} for each in (base, better, likely, worse)]
    (tmp_path / "metrics.json").write_text(json.dumps(both))
    found = read_metrics(tmp_path)
    assert found.tests == ["sums", "code"]
    assert found.scores["spd", "sums"]["sums"].difference == pytest.approx(20.0)
    assert found.scores["spd", "sums"]["code"].difference == pytest.approx(-0.25), "a higher NLL is worse"
    assert found.scores["base", None]["sums"].difference is None
    text = " ".join(body_text(explore({"one": made()}, metrics=found)).split())
    assert "sumsn = 50" in text and "60.0 (+20.0) 50.0 to 70.0" in text and "1.750 (-0.250)" in text
    assert "no outcomes question by question" in text


def test_scores_of_a_reproduction_are_tested_in_pairs(tmp_path, undrawn):
    def cell(capability, arm, marks):
        outcome = {"metric": "accuracy", "correct": marks, "nll": [], "changed": 0.0, "too_long": []}
        return {"capability": capability, "arm": arm, "test": "sums", "outcomes": [outcome]}

    cells = [
        cell(None, "base", "0" * 30 + "1" * 10),
        cell("sums", "spd", "1" * 40),
        cell("code", "spd", "0" * 29 + "1" * 11),
        cell("sums", "spd:rank=4", "1" * 40),
    ]
    (tmp_path / "results.json").write_text(json.dumps({"cells": cells}))
    found = read_metrics(tmp_path / "results.json")
    assert list(found.scores) == [("base", None), ("spd", "sums"), ("spd", "code")]
    assert found.scores["spd", "sums"]["sums"].p < 1e-6 and found.scores["spd", "code"]["sums"].p == 1.0
    page = explore({"one": made()}, metrics=found)
    assert re.findall(r'class="beyond">([\d.]+)', page) == ["100.0"]


@pytest.mark.parametrize("content", [[], {}, [{"task": "x"}], {"cells": [{}]}, "words", [1]])
def test_metrics_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(spd.InputError, match="expected a run's metrics or a reproduction's results"):
        read_metrics(tmp_path)
    with pytest.raises(spd.InputError, match="holds neither"):
        read_metrics(tmp_path.parent)
    with pytest.raises(spd.InputError, match="there is no"):
        read_metrics(tmp_path / "nothing.json")


def test_the_json_holds_what_the_page_shows(gradients):
    subspaces = {"one": made(seed=1, model="m"), "other": made(seed=2, model="m")}
    found = json.loads(json.dumps(explore_json(subspaces, tokens=gradients)))
    (pair,) = found["between_subspaces"]
    assert len(pair["sites"]) == 4 and len(pair["sites"][0]["angles"]) == 8
    assert found["subspaces"]["one"]["sites"][0]["energy"] == subspaces["one"].k[0].energy()
    assert found["subspaces"]["one"]["between_layers"]["sites"] == ["k.0", "k.1", "v.0", "v.1"]
    first = found["tokens"]["examples"][0]
    assert "".join(first["tokens"]) == gradients[0].text
    assert {len(norms) for norms in first["norms"].values()} == {len(first["tokens"])}


def test_figures_are_written_whole(tmp_path):
    written = write_figures(tmp_path / "figures", {"one": made(seed=1)})
    assert {path.stem for path in written} == {"spectra", "energy", "layers"}
    assert sorted((tmp_path / "figures").iterdir()) == sorted(written), "no temporary file is left"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize("subspaces", [{}, [made()], {"one": 1}, {1: made()}])
def test_what_is_no_subspace_is_refused(subspaces):
    with pytest.raises(spd.InputError, match="subspaces: expected"):
        explore(subspaces)
