"""Seconds, tokens and bounds of stages: the arithmetic, what is added to what, and how it is shown."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import spd
from spd.errors import InputError
from spd.profile import Profile, forget_peak, measure, peak_bytes, profile_rows, profile_table
from spd_kernels.roofline import Machine

FAST_MEMORY = Machine("no limit on bytes", 1e30, {torch.float32: 1e9})
FAST_ARITHMETIC = Machine("no limit on FLOPs", 1e6, {torch.float32: 1e30})


def layers_and_head(model) -> tuple[int, int]:
    head = model.get_output_embeddings().weight.numel()
    inputs = model.get_input_embeddings().weight.numel()
    every = sum(parameter.numel() for parameter in model.parameters())
    return every - inputs - (0 if model.config.tie_word_embeddings else head), head


@pytest.mark.parametrize("tied", [False, True])
def test_work_becomes_the_least_time(make_model, tied):
    model = make_model("qwen2", tie_word_embeddings=tied)
    layers, head = layers_and_head(model)
    profile = Profile(model, machine=FAST_MEMORY)
    with profile.stage("generate", "words"):
        profile.count(100, predicted=10, passes=7)
        profile.count(50, backward=0.5, predicted=5)
    (stage,) = profile.stages.values()
    flops = 2 * layers * 100 + 2 * head * 10 + 2 * layers * 75 + 4 * head * 5
    assert stage.tokens == 150 and stage.bound == pytest.approx(flops / 1e9)

    profile = Profile(model, machine=FAST_ARITHMETIC)
    with profile.stage("generate", "words"):
        profile.count(100, predicted=10, passes=7)
    assert profile.stages["generate", "words"].bound == pytest.approx(7 * 4 * (layers + head) / 1e6)


def test_processes_share_the_arithmetic_and_each_reads_the_weights(model, monkeypatch):
    layers, head = layers_and_head(model)
    monkeypatch.setattr("spd.distributed.size", lambda: 4)
    for machine, expected in (
        (FAST_MEMORY, 2 * layers * 100 / 4 / 1e9 + 2 * layers * 100 / 1e9),
        (FAST_ARITHMETIC, 2 * 7 * 4 * (layers + head) / 1e6),
    ):
        profile = Profile(model, machine=machine)
        with profile.stage("calibrate", "words"):
            profile.count(100, passes=7)
            profile.count(100, passes=7, workers=1)
        assert profile.stages["calibrate", "words"].bound == pytest.approx(expected)


def test_what_the_method_did_is_what_is_counted(model, tokenizer, examples, prompts, tmp_path):
    layers, head = layers_and_head(model)
    profile = Profile(model, machine=FAST_MEMORY)
    with profile.stage("calibrate", "a"):
        subspace = spd.calibrate(model, tokenizer, examples, layers=[2, 3], progress=False)
        profile.count_calibration(subspace)
    tokens = sum(len(tokenizer(example.text)["input_ids"]) for example in examples)
    calibrated = profile.stages["calibrate", "a"]
    targets, depth = subspace.provenance["target_tokens"], model.config.num_hidden_layers
    assert calibrated.tokens == tokens
    assert calibrated.bound == pytest.approx(
        (2 * layers * tokens * (1 + (depth - 2) / depth) + 4 * head * targets) / 1e9
    )

    path = tmp_path / "completions.jsonl"
    with profile.stage("generate", "a"), profile.completions(path, tokenizer):
        made = spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=5, progress=False)
    read = sum(len(tokenizer(each.prompt)["input_ids"]) + len(each.tokens) - 1 for each in made)
    assert profile.stages["generate", "a"].tokens == read

    adapter, recipe = tmp_path / "adapter", spd.Recipe(epochs=3, batch_size=4)
    for _ in range(2):  # the second time it is there
        with profile.stage("distill", "a"), profile.training(adapter):
            spd.distill(model, tokenizer, made, out=adapter, recipe=recipe, progress=False)
    trained = sum(len(tokenizer(each.prompt)["input_ids"]) + len(each.tokens) for each in made)
    assert profile.stages["distill", "a"].tokens == 3 * trained
    assert profile.stages["distill", "a"].bound == pytest.approx(4 * (layers + head) * 3 * trained / 1e9)


def test_only_what_is_new_is_counted(model, tokenizer, prompts, tmp_path):
    path = tmp_path / "completions.jsonl"
    made = spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
    profile = Profile(model, machine=FAST_MEMORY)
    with profile.stage("generate", "again"), profile.completions(path, tokenizer):
        spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
    assert profile.stages["generate", "again"].tokens == 0

    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:9])  # one line torn, one lost
    missing = {index for index in range(len(prompts))} - {json.loads(line)["index"] for line in lines[:-2]}
    with (
        pytest.raises(KeyboardInterrupt),
        profile.stage("generate", "resumed"),
        profile.completions(path, tokenizer),
    ):
        spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
        raise KeyboardInterrupt
    expected = sum(len(tokenizer(prompts[i])["input_ids"]) + len(made[i].tokens) - 1 for i in missing)
    assert len(missing) == 2 and profile.stages["generate", "resumed"].tokens == expected


def test_what_a_killed_sittings_workers_wrote_is_not_counted(model, tokenizer, prompts, tmp_path):
    path = tmp_path / "completions.jsonl"
    made = spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
    lines = path.read_bytes().splitlines(keepends=True)
    there = {json.loads(line)["index"] for line in lines[:5]}
    path.with_name("completions.shard-1-of-2.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:9])
    path.unlink()
    profile = Profile(model, machine=FAST_MEMORY)
    with profile.stage("generate", "resumed"), profile.completions(path, tokenizer):
        spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
    fresh = [each for each in made if each.index not in there]
    expected = sum(len(tokenizer(each.prompt)["input_ids"]) + len(each.tokens) - 1 for each in fresh)
    assert len(fresh) == len(prompts) - 5 and profile.stages["generate", "resumed"].tokens == expected


@pytest.mark.parametrize("damage", [b"{not json\n", b"[1]\n", b'{"prompt": "a"}\n', b'{"index": [1]}\n', b"\xff\xfe\n"])
def test_a_damaged_file_of_completions_is_left_to_generate(model, tokenizer, prompts, tmp_path, damage):
    path = tmp_path / "completions.jsonl"
    spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
    with path.open("ab") as file:
        file.write(damage)
    profile = Profile(model, machine=FAST_MEMORY)
    with (
        pytest.raises(InputError, match="not a completion of these prompts"),
        profile.stage("generate", "a"),
        profile.completions(path, tokenizer),
    ):
        spd.generate(model, tokenizer, prompts, out=path, max_new_tokens=4, progress=False)
    assert profile.stages["generate", "a"].tokens == 0


@pytest.mark.parametrize(
    "damage",
    [
        *(
            "",
            "{",
            "[]",
            "{}",
            '{"stages": 3}',
            '{"stages": [{"kind": "a"}]}',
            '{"stages": [{"kind": "a", "what": 1}]}',
        ),
        *('{"stages": [{"kind": "a", "what": "b", "x": 1}]}', '{"stages": [{"kind": "a", "what": "b", "tokens": ""}]}'),
    ],
)
def test_a_damaged_profile_is_begun_anew(model, tmp_path, damage):
    path = tmp_path / "profile.json"
    path.write_text(damage)
    with pytest.warns(UserWarning, match="begun anew"):
        profile = Profile(model, path, machine=FAST_MEMORY)
    with profile.stage("generate", "a"):
        profile.count(10)
    (stage,) = json.loads(path.read_text())["stages"]
    assert stage["tokens"] == 10


def test_what_is_not_known_has_seconds_and_no_share(model, tokenizer, tmp_path):
    """A training that goes on from a checkpoint, and an evaluation that leaves no completions."""
    profile = Profile(model, tmp_path / "profile.json", machine=FAST_MEMORY)
    (tmp_path / "adapter.checkpoints" / "checkpoint-100").mkdir(parents=True)
    with profile.stage("distill", "a"), profile.training(tmp_path / "adapter"):
        profile.count(10)
    with profile.stage("evaluate", "a"), profile.completions(tmp_path / "none.jsonl", tokenizer):
        profile.count(10)
    with profile.stage("evaluate", "b"):
        profile.count(10)
    for stored in (profile.to_json(), Profile(model, tmp_path / "profile.json", machine=FAST_MEMORY).to_json()):
        rows = {(row.kind, row.what): row for row in profile_rows(stored)}
        for place in (("distill", "a"), ("distill", None), ("evaluate", "a")):
            assert rows[place].share is None and rows[place].tokens_per_second is None and rows[place].tokens == 10
        known = rows["evaluate", "b"]
        assert known.share is not None and known.tokens_per_second == pytest.approx(10 / known.seconds)
        assert rows["evaluate", None].share == known.share == rows[None, None].share
        assert rows["evaluate", None].tokens == 20


def test_no_peak_rather_than_that_of_the_process(model, monkeypatch):
    monkeypatch.setattr("spd.profile.forget_peak", lambda device: False)
    profile = Profile(model, machine=FAST_MEMORY)
    with profile.stage("generate", "a"):
        profile.count(10)
    assert profile.stages["generate", "a"].peak_bytes is None


def test_sittings_add_up_and_stages_inside_others_do_not(model, tmp_path):
    path = tmp_path / "profile.json"
    for _ in range(2):
        profile = Profile(model, path, machine=FAST_MEMORY)
        with profile.stage("evaluate", "outer"):
            profile.count(10)
            with profile.stage("distill", "inner"):
                profile.count(5)
                time.sleep(0.2)
    stored = json.loads(path.read_text())
    stages = {(stage["kind"], stage["what"]): stage for stage in stored["stages"]}
    assert stages["evaluate", "outer"]["tokens"] == 20 and stages["distill", "inner"]["tokens"] == 10
    assert stages["distill", "inner"]["seconds"] > 0.39 > stages["evaluate", "outer"]["seconds"] >= 0
    assert stored == profile.to_json()


def stored(*stages: tuple[str, str, float, int, float, int | None]) -> dict:
    names = ("kind", "what", "seconds", "tokens", "bound", "peak_bytes")
    machine = {"name": "x", "bytes_per_second": 1e10, "flops_per_second": 1e11, "dtype": "float32"}
    return {"machine": machine, "stages": [dict(zip(names, stage, strict=True)) for stage in stages]}


def test_rows_sum_up_kinds_and_the_whole():
    profile = stored(
        ("generate", "a, plain", 2.0, 100, 1.0, 2**30),
        ("calibrate", "a", 1.0, 50, 0.1, 2**31),
        ("generate", "a, projected", 2.0, 300, 2.0, None),
        ("report", "report.html", 5.0, 0, 0.0, None),
    )
    rows = {(row.kind, row.what): row for row in profile_rows(profile)}
    assert list(rows) == [
        ("generate", None),
        ("generate", "a, plain"),
        ("generate", "a, projected"),
        ("calibrate", None),
        ("calibrate", "a"),
        ("report", None),
        ("report", "report.html"),
        (None, None),
    ]
    generated = rows["generate", None]
    assert (generated.seconds, generated.tokens, generated.share) == (4.0, 400, 0.75)
    assert generated.tokens_per_second == 100 and generated.peak_bytes == 2**30
    assert rows["report", None].share is None and rows["report", None].tokens_per_second is None
    whole = rows[None, None]  # the share is that of the stages whose work is known
    assert (whole.seconds, whole.tokens, whole.peak_bytes) == (10.0, 450, 2**31)
    assert whole.share == pytest.approx(3.1 / 5.0)

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(profile_table(profile))
    text = console.export_text()
    for wanted in ("a, projected", "75 %", "100 GFLOP/s in float32", "2.00 GiB", "450"):
        assert wanted in text


def test_rates_are_measured():
    machine = measure(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.bytes_per_second < 1e13 and 1e8 < machine.flops_per_second[torch.float32] < 1e15


def test_the_peak_is_that_of_the_stage():
    device = torch.device("cpu")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not say how much memory a process took at most")
    large = torch.ones(2**26)
    with_it = peak_bytes(device)
    del large
    forget_peak(device)
    without = peak_bytes(device)
    assert with_it is not None and without is not None and with_it - without > 2**27
