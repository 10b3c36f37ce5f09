"""Long contexts: the cache's bytes are arithmetic, cells resume, texts hold what they say, bad input is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import spd
from spd.errors import InputError
from spd.intervention.latent_cache import cache_bytes
from spd.long_context import Settings, experiment, resumes, run
from spd.long_context.decoding import MODES, filled_cache, measure
from spd.long_context.experiment import cells, truncated
from spd.long_context.figures import cache_figure, perplexity_figure, position_figure, retrieval_figure
from spd.long_context.haystack import Texts, windows_of
from spd.long_context.quality import perplexity, retrieval, token_losses
from spd.long_context.report import paired, ratio, spread, write_report
from spd.long_context.shapes import SHAPES, make_model, random_subspace
from spd.proving_ground import recall, recall_checkpoint
from spd.stats import mean_interval, wilson_interval

DECODE = Settings(
    model=None, shape="tiny", parts=("decode",), contexts=(64, 128), decode_rank=8, rounds=2, tokens=2, device="cpu"
)


@pytest.fixture(scope="module")
def recall_model() -> tuple[Any, Any]:
    return spd.load_model(recall_checkpoint(), device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return make_model("tiny", context=512, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished small run of everything on the carried model."""
    out = tmp_path_factory.mktemp("long") / "run"
    settings = Settings(
        contexts=(256, 512),
        rounds=2,
        tokens=2,
        ranks=(8, 32),
        layers=("all",),
        haystacks=2,
        needles=4,
        windows=2,
        examples=12,
        device="cpu",
    )
    run(settings, out, progress=False)
    return out, settings


# Decoding


@pytest.mark.parametrize("mode", ["unprojected", "fold", "latent_v", "latent"])
def test_a_filled_cache_is_as_large_as_one_that_was_decoded_into(tiny: Any, mode: str) -> None:
    subspace = random_subspace(tiny, 8)
    handle = None if mode == "unprojected" else spd.attach(tiny, subspace, mode=mode)
    try:
        with torch.inference_mode():
            filled = filled_cache(tiny, 100, batch=2)
            taken = DynamicCache(config=tiny.config)
            tiny(input_ids=torch.ones((2, 100), dtype=torch.long), past_key_values=taken, use_cache=True)
        assert filled.get_seq_length() == taken.get_seq_length() == 100
        assert cache_bytes(filled) == cache_bytes(taken)
        with torch.inference_mode():
            logits = tiny(input_ids=torch.ones((2, 1), dtype=torch.long), past_key_values=filled).logits
        assert filled.get_seq_length() == 101
        assert logits.isfinite().all()
    finally:
        if handle is not None:
            handle.remove()


def test_bytes_of_every_mode(tiny: Any) -> None:
    """An attached layer takes (r_k + r_v) / 2d of the dense one under latent, (d + r_v) / 2d under latent_v."""
    d, rank, context = 64, 8, 128
    told: list[str] = []
    found = measure(tiny, random_subspace(tiny, rank), context, rounds=2, tokens=2, batch=3, step=told.append)
    dense = 2 * 4 * 3 * context * d
    expected = {"latent": dense * rank // d, "latent_v": dense * (d + rank) // (2 * d)}
    for mode in MODES:
        assert found[mode]["bytes_by_layer"] == [expected.get(mode, dense)] * 2
        assert found[mode]["bytes"] == sum(found[mode]["bytes_by_layer"])
        assert len(found[mode]["seconds"]) == 2 and min(found[mode]["seconds"]) > 0
    assert told == [*MODES, *reversed(MODES)]


def test_only_attached_layers_shrink(tiny: Any) -> None:
    found = measure(tiny, random_subspace(tiny, 8, layers=[1]), 96, modes=("unprojected", "latent"), rounds=1, tokens=1)
    before, after = found["unprojected"]["bytes_by_layer"], found["latent"]["bytes_by_layer"]
    assert after == [before[0], before[1] * 8 // 64]


def test_what_is_refused_says_why_and_the_rest_is_measured(make_model: Any) -> None:
    model = make_model("gemma3")  # attends within a window of 64
    found = measure(model, random_subspace(model, 4), 100, modes=("unprojected", "fold", "latent"), rounds=1, tokens=1)
    assert "window" in found["latent"]["refused"]
    assert found["unprojected"]["bytes"] == found["fold"]["bytes"] > 0


@pytest.mark.parametrize("family", [name for name in ("qwen3", "llama", "gpt2") if name in FAMILIES])
def test_the_model_is_left_as_it_was(make_model: Any, family: str) -> None:
    model = make_model(family)
    tokens = torch.arange(20)[None]
    before = model(input_ids=tokens).logits
    measure(model, random_subspace(model, 4), 64, rounds=1, tokens=1)
    assert torch.equal(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"modes": ("dense",)}, "modes"),
        ({"context": 10**6}, "context"),
        ({"context": 20}, "context"),
        ({"rounds": 0}, "rounds"),
        ({"tokens": 0}, "tokens"),
        ({"batch": -1}, "batch"),
    ],
)
def test_measure_names_a_bad_argument(tiny: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: expected"):
        measure(tiny, random_subspace(tiny, 4), **({"context": 64} | arguments))


# Shapes


def test_published_shapes_have_their_parameters() -> None:
    from spd.long_context.shapes import LlamaConfig

    for name, billions in (("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62)):
        kind, widths = SHAPES[name]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind(**widths, tie_word_embeddings=False))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)
        assert model.config.max_position_embeddings == 131072
    assert SHAPES["small"][0] is LlamaConfig


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spd.long_context.shapes._available", lambda device: 10 * 2**30)
    with pytest.raises(InputError, match=r"^shape: llama-3.1-8b needs 29.9 GiB .* 10.0 GiB left.*tiny"):
        make_model("llama-3.1-8b", context=32768, device="cpu")
    with pytest.raises(InputError, match=r"^shape: expected one of .*, got 'llama'"):
        make_model("llama", context=64)


def test_rank_of_a_random_subspace(tiny: Any) -> None:
    assert random_subspace(tiny, 64).k[0].rank == 64
    with pytest.raises(InputError, match=r"^rank: expected 1 to d = 64, got 65"):
        random_subspace(tiny, 65)


def test_truncating_keeps_the_first_directions(tiny: Any) -> None:
    whole = random_subspace(tiny, 16)
    cut = truncated(whole, 5)
    assert torch.equal(cut.v[1].basis, whole.v[1].basis[:, :5])
    assert cut.k[0].energy() == pytest.approx(5 / 64)


# Texts


@pytest.mark.parametrize("context", [256, 700, 4096])
def test_a_haystack_holds_its_needles_once_and_fits(context: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recall_checkpoint())
    haystack = Texts(tokenizer).haystack(3, context, 8)
    longest = max(len(needle.question) + len(needle.answer) for needle in haystack.needles)
    assert context - 40 < len(haystack.tokens) + longest <= context
    text = tokenizer.decode(haystack.tokens)
    for needle in haystack.needles:
        assert text.count(tokenizer.decode(needle.question + needle.answer)) == 1
    depths = [needle.depth for needle in haystack.needles]
    assert depths == sorted(depths) and depths[0] < 0.25 and depths[-1] > 0.75
    assert tokenizer.unk_token_id not in haystack.tokens


def test_texts_follow_from_the_seed(tokenizer: Any) -> None:
    texts = Texts(tokenizer, seed=1)
    assert texts.haystack(0, 600, 2) == Texts(tokenizer, seed=1).haystack(0, 600, 2)
    assert texts.haystack(0, 600, 2) != Texts(tokenizer, seed=2).haystack(0, 600, 2)
    assert texts.window(0, 100) == texts.window(0, 200)[:100]
    with pytest.raises(InputError, match="context: 200 tokens have no room for 16 needles"):
        texts.haystack(0, 200, 16)


def test_calibration_examples_mark_the_number() -> None:
    texts = Texts(AutoTokenizer.from_pretrained(recall_checkpoint()))
    for example in texts.examples(5, 128):
        (start, end) = example.spans[0]
        number = example.text[start:end]
        assert number in recall.NUMBERS and example.completion == f" {number}"
        name = example.prompt.split()[-2]
        assert f" {name} is {number}." in example.prompt


def test_windows_of_a_given_text_overlap_by_half() -> None:
    assert list(windows_of(list(range(10)), 4, 3)) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    with pytest.raises(InputError, match="text: 10 tokens are too few for 5 windows of 4"):
        list(windows_of(list(range(10)), 4, 5))


# Quality


def test_the_carried_model_retrieves_and_counts_add_up(recall_model: tuple[Any, Any]) -> None:
    model, tokenizer = recall_model
    texts = Texts(tokenizer)
    found = retrieval(model, (texts.haystack(number, 512, 8) for number in range(3)))
    assert found["n"] == 24 == sum(part["n"] for part in found["by_depth"])
    assert found["correct"] == sum(part["correct"] for part in found["by_depth"]) >= 20
    assert found["interval_95"] == list(wilson_interval(found["correct"], 24))
    assert [len(verdict) for verdict in found["verdicts"]] == [8] * 3
    assert "".join(found["verdicts"]).count("1") == found["correct"]
    with spd.attach(model, random_subspace(model, 2)):
        lost = retrieval(model, (texts.haystack(number, 512, 8) for number in range(3)))
    assert lost["interval_95"][1] < found["interval_95"][0]
    assert paired(lost, found) == 2 / 2**3 and paired(found, found) == 1.0


@pytest.mark.parametrize("mode", ["fold", "hook", "latent_v", "latent"])
def test_every_mode_retrieves_the_same(recall_model: tuple[Any, Any], mode: str) -> None:
    model, tokenizer = recall_model
    texts = Texts(tokenizer)
    subspace = random_subspace(model, 48)
    counts = []
    for each in ("hook", mode):
        with spd.attach(model, subspace, mode=each):
            counts.append(retrieval(model, [texts.haystack(0, 300, 8)])["by_depth"])
    assert counts[0] == counts[1]


def test_losses_in_chunks_are_the_losses_in_one_go(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3").double()
    window = (torch.arange(90) * 37 % 250).tolist()
    tokens = torch.tensor([window])
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
    )
    monkeypatch.setattr("spd.long_context.quality.CHUNK", 16)
    (found,) = token_losses(model, [window])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_perplexity_is_over_the_second_halves(make_model: Any) -> None:
    model = make_model("llama")
    windows = [(torch.arange(200) * k % 250).tolist() for k in (37, 41, 43)]
    found = perplexity(model, windows)
    halves = [float(losses[len(losses) // 2 :].mean()) for losses in token_losses(model, windows)]
    assert found["windows"] == pytest.approx(halves)
    assert math.log(found["perplexity"]) == pytest.approx(sum(halves) / 3)
    assert found["interval_95"][0] < found["perplexity"] < found["interval_95"][1]
    assert [part["end"] for part in found["by_position"]] == [64, 128, 256]


# The folder


def test_a_run_has_its_cells_figures_and_report(folder: Any) -> None:
    out, settings = folder
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] and list(results["cells"]) == [cell.key for cell in cells(settings)]
    assert results["environments"][0]["versions"]["torch"]
    names = {"cache.png", "retrieval.png", "perplexity.png", "position.png"}
    report = (out / "report.md").read_text()
    for name in names:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in report
    assert {path.name for path in out.iterdir()} == names | {"results.json", "report.md", "subspaces"}
    for cell in results["cells"].values():
        assert "modes" in cell or "interval_95" in cell
    base = results["cells"]["retrieval/512/none"]
    assert f"{100 * base['accuracy']:.1f} [" in report and f"n = {base['n']} a cell" in report
    assert not resumes(settings, out)


def test_the_cells_do_not_depend_on_the_way(folder: Any, tmp_path: Any) -> None:
    """A run of one context and one rank measures what the larger one measured there."""
    out, settings = folder
    run(replace(settings, contexts=(256,), parts=("retrieval", "perplexity")), tmp_path / "other", progress=False)
    whole, part = (json.loads((f / "results.json").read_text())["cells"] for f in (out, tmp_path / "other"))
    assert len(part) == 10
    for key, cell in part.items():
        if cell.get("perplexity"):
            assert cell["perplexity"] == pytest.approx(whole[key]["perplexity"], rel=1e-4)
        else:
            assert cell == whole[key]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    real = experiment.decoding.measure

    def fail_at_the_second(model: Any, subspace: Any, context: int, **rest: Any) -> Any:
        measured.append(context)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(model, subspace, context, **rest)

    monkeypatch.setattr(experiment.decoding, "measure", fail_at_the_second)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(DECODE, out, progress=False)
    assert resumes(DECODE, out)
    kept = json.loads((out / "results.json").read_text())["cells"]["decode/64"]
    (out / ".results.json.x.tmp").write_text("half")
    report = run(DECODE, out, progress=False)
    assert measured == [64, 128, 128]
    assert json.loads((out / "results.json").read_text())["cells"]["decode/64"] == kept
    assert not list(out.glob(".*"))
    run(DECODE, out, progress=False)
    assert len(measured) == 3 and "| 128 |" in report.read_text()
    run(DECODE, out, again=True, progress=False)
    assert measured[3:] == [64, 128]


def test_a_folder_of_something_else_is_refused(tmp_path: Any) -> None:
    run(replace(DECODE, contexts=(64,), rounds=1), tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"^out: .* other settings \(different: rounds, tokens\)"):
        run(replace(DECODE, contexts=(64,), rounds=3, tokens=3), tmp_path / "run", progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"^out: .* holds no run"):
        run(DECODE, tmp_path / "other", progress=False)
    with pytest.raises(InputError, match=r"^out: .* not a folder"):
        run(DECODE, tmp_path / "other" / "thesis.tex", progress=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modes": ("latent", "dense")}, "modes: expected different ones of unprojected, .*, got latent, dense"),
        ({"modes": ()}, "modes: .* got none"),
        ({"parts": ("decode", "decode")}, "parts"),
        ({"contexts": ()}, "contexts: .* got none"),
        ({"contexts": (512, 0)}, "contexts"),
        ({"ranks": (4, 4)}, "ranks"),
        ({"layers": ()}, "layers"),
        ({"windows": 1}, "windows: expected at least 2, got 1"),
        ({"needles": 0}, "needles"),
        ({"model": None}, "model, shape: expected one of them, got None and None"),
        ({"model": None, "shape": "tiny"}, "shape: .* parts"),
        ({"model": None, "shape": "huge", "parts": ("decode",)}, "shape"),
    ],
)
def test_settings_name_a_bad_one(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}"):
        Settings(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"contexts": (4097,)}, "context: expected at most 4096 tokens"),
        ({"ranks": (65,)}, "ranks, decode_rank: expected at most d = 64, got 65"),
        ({"decode_rank": 100}, "ranks, decode_rank: expected at most d = 64, got 100"),
        ({"layers": ("first",)}, "layers: expected"),
        ({"contexts": (48,)}, "context: expected at least 64 tokens, got 48"),
        ({"contexts": (128,)}, "context: 128 tokens have no room for 16 needles"),
        ({"text": "nowhere.txt"}, "text: nowhere.txt cannot be read"),
        ({"text": __file__}, "text: .* tokens are too few for 12 windows of 4096 tokens"),
        ({"layers": ("7",)}, "layers: the model has no"),
        ({"subspace": "nowhere"}, "nowhere: not a subspace folder"),
        ({"model": str(Path(__file__).parent)}, "model: the folder .* holds no checkpoint"),
    ],
)
def test_what_the_model_cannot_do_is_refused_at_once(tmp_path: Any, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}"):
        run(replace(Settings(device="cpu"), **changes), tmp_path / "run", progress=False)


def test_a_given_subspace_is_measured_up_to_its_rank(folder: Any, tmp_path: Any) -> None:
    out, settings = folder
    given = replace(
        settings, subspace=str(out / "subspaces" / "all"), parts=("decode", "retrieval"), contexts=(256,), ranks=(8,)
    )
    run(given, tmp_path / "run", progress=False)
    cells_ = json.loads((tmp_path / "run" / "results.json").read_text())["cells"]
    assert "its first 16 directions" in (tmp_path / "run" / "report.md").read_text()
    earlier = json.loads((out / "results.json").read_text())["cells"]
    assert cells_["retrieval/256/calibrated given 8"]["correct"] == earlier["retrieval/256/calibrated all 8"]["correct"]
    with pytest.raises(InputError, match=r"^ranks, decode_rank: expected at most 32, the rank of "):
        run(replace(given, ranks=(48,)), tmp_path / "more", progress=False)


# Verdicts


def test_the_test_is_paired_and_flips_whole_haystacks() -> None:
    """By hand: haystacks move by +2, -1 and 0, so that T = 1 and all of |3|, |1|, |1|, |3| reach it."""
    base, moved = {"verdicts": ["0011", "1111", "0101"]}, {"verdicts": ["1111", "0111", "1010"]}
    assert paired(moved, base) == 1.0
    lost = {"verdicts": ["0010", "0000", "0000"]}  # -1, -4 and -2: all one way
    assert paired(lost, base) == paired(base, lost) == 2 / 2**3


def test_the_report_tests_each_projection_against_the_unprojected(folder: Any) -> None:
    out, _ = folder
    found = json.loads((out / "results.json").read_text())["cells"]
    cell, base = found["retrieval/512/random all 8"], found["retrieval/512/none"]
    change = f"{100 * (cell['accuracy'] - base['accuracy']):+.1f} ({paired(cell, base):.3f}, "
    report = (out / "report.md").read_text()
    assert change in report and "Holm over all 8 comparisons" in report and "no p below 0.500" in report
    assert "intervals that do not overlap" not in report


def test_results_without_verdicts_are_still_reported(folder: Any, tmp_path: Any) -> None:
    results = json.loads((folder[0] / "results.json").read_text())
    for cell in results["cells"].values():
        cell.pop("verdicts", None)
    (tmp_path / "results.json").write_text(json.dumps(results))
    report = write_report(tmp_path).read_text()
    assert "by intervals that do not overlap" in report and "Holm" not in report


# Figures


def test_names_at_the_ends_do_not_overlap(folder: Any) -> None:
    out, _ = folder
    found = json.loads((out / "results.json").read_text())["cells"]
    for draw, part in (
        (cache_figure, "decode"),
        (retrieval_figure, "retrieval"),
        (perplexity_figure, "perplexity"),
        (position_figure, "perplexity"),
    ):
        figure = draw([cell for key, cell in found.items() if key.startswith(part)])
        figure.draw_without_rendering()
        for axis in figure.axes:
            boxes = [text.get_window_extent() for text in axis.texts]
            assert not any(box.overlaps(other) for n, box in enumerate(boxes) for other in boxes[:n])
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width
            assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_ratio_of_perplexities_is_paired() -> None:
    base = [1.0, 2.0, 3.0]
    middle, low, high = ratio([loss + 0.1 for loss in base], base)
    assert middle == low == high == pytest.approx(math.exp(0.1))
    middle, low, high = ratio([1.1, 2.1, 3.4], base)
    assert middle == pytest.approx(math.exp(0.2)) and low < middle < high


def test_interval_of_a_mean() -> None:
    middle, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (middle, high - middle, middle - low) == pytest.approx((2.0, 4.303 / 3**0.5, 4.303 / 3**0.5), rel=1e-3)
    _, low, high = mean_interval([0.0, 1.0] * 50)
    assert high - low == pytest.approx(2 * 1.984 * 0.50252 / 10, rel=1e-2)


def test_spread() -> None:
    assert spread([2.0]) == (2.0, 2.0, 2.0)
    assert spread([3.0, 1.0, 2.5]) == (2.5, 1.0, 3.0)


# The command line, and the model that is carried


def test_the_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from spd.cli import main

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["spd", "long-context", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    small = [
        "--shape",
        "tiny",
        "--contexts",
        "64,128",
        "--rounds",
        "1",
        "--tokens",
        "1",
        "--decode-rank",
        "8",
        "--quiet",
    ]
    assert call(*small, "--out", str(tmp_path / "run"), "--device", "cpu") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.md")
    assert call("--contexts", "many") == 2
    assert "--contexts: expected numbers" in capsys.readouterr().err
    assert call("--shape", "tiny", "--model", "recall") == 2
    assert call("--modes", "dense", "--shape", "tiny") == 2


def test_the_carried_model_is_as_documented() -> None:
    record = json.loads((recall_checkpoint() / "build.json").read_text())
    files = list(recall_checkpoint().iterdir())
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
    assert set(record["retrieval"]) == {"512", "1024", "2048", "4096"}
    assert record["parameters"] == sum(
        p.numel() for p in spd.load_model(recall_checkpoint(), device="cpu")[0].parameters()
    )


def test_training_texts_are_what_the_model_meets(recall_model: tuple[Any, Any]) -> None:
    from random import Random

    from spd.proving_ground.build_recall import POSITIONS, STAGES, batch

    tokenizer = recall_model[1]
    tokens, positions, repeated = batch(tokenizer.get_vocab(), Random(0), STAGES[1])
    assert tokens.shape == positions.shape == repeated.shape == (STAGES[1].batch, STAGES[1].tokens)
    assert (positions.diff(dim=1) >= 1).all() and positions.min() >= 0 and positions.max() < POSITIONS
    words = tokenizer.convert_ids_to_tokens(tokens[repeated.bool()])
    assert words and set(words) <= set(recall.NUMBERS)
    for row in range(len(tokens)):
        seen = tokenizer.convert_ids_to_tokens(tokens[row].tolist())
        for at in repeated[row].nonzero().flatten().tolist():
            earlier = [seen[n + 2] for n in range(at - 2) if seen[n] == seen[at - 2] and seen[n + 1] == "is"]
            assert earlier and set(earlier) == {seen[at]}
