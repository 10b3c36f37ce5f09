"""The whole method in one folder: what it leaves, how it resumes, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

import spd
from spd.arms import DEFAULT_ARMS as ARMS
from spd.config import parse_config
from spd.report import write_report
from spd.run import run


def config_for(checkpoint, made_records, **changes):
    return parse_config(
        {
            "model": str(checkpoint),
            "data": str(made_records),
            "tasks": ["gsm8k"],
            "evaluate": ["gsm8k", "svamp"],
            "calibration": {"examples": 12},
            "generation": {"max_new_tokens": 12, "batch_size": 4},
            "training": {"epochs": 2, "learning_rate": 1e-3},
            "evaluation": {"max_new_tokens": 8},
        }
        | changes
    )


@pytest.fixture(scope="module")
def finished(checkpoint, made_records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    stages = []
    scores = run(config_for(checkpoint, made_records), folder, profile=True, progress=False, say=stages.append)
    return folder, scores, stages


def test_four_arms_on_every_test(finished):
    _, scores, _ = finished
    assert [(score.arm, score.evaluation.task, score.evaluation.n) for score in scores] == [
        (arm, task, 6) for arm in ARMS for task in ("gsm8k", "svamp")
    ]


def test_the_folder_holds_what_it_should(finished):
    folder, scores, _ = finished
    expected = [
        *("config.json", "environment.json", "metrics.json", "timings.json", "report.html"),
        *("base/evaluations/gsm8k.jsonl", "base/evaluations/svamp.scored.jsonl"),
        *("gsm8k/subspace/subspace.json",),
        *("gsm8k/generations/plain.jsonl", "gsm8k/generations/projected.jsonl"),
        *("gsm8k/adapters/plain/adapter_model.safetensors", "gsm8k/adapters/projected/training.json"),
        *("gsm8k/evaluations/projected/gsm8k.jsonl", "gsm8k/evaluations/self-training/svamp.jsonl"),
        "gsm8k/evaluations/spd/gsm8k.scored.jsonl",
    ]
    assert [name for name in expected if not (folder / name).is_file()] == []
    assert not list(folder.rglob("*.tmp"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == [score.to_dict() for score in scores]
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert {"torch", "transformers", "peft"} <= set(environment["versions"])


def test_the_profile_has_every_stage(finished):
    folder, _, stages = finished
    profile = json.loads((folder / "profile.json").read_text())
    found = {f"{stage['kind']}: {stage['what']}": stage for stage in profile["stages"]}
    assert set(found) == {stage for stage in stages if not stage.startswith("load")}
    for name, stage in found.items():
        assert stage["seconds"] > 0
        assert (stage["tokens"] > 0 and stage["bound"] > 0) == (not name.startswith("report"))
    timings = json.loads((folder / "timings.json").read_text())
    for kind, seconds in timings.items():
        assert sum(s["seconds"] for s in profile["stages"] if s["kind"] == kind) == pytest.approx(seconds, rel=0.2)
    assert "Where the time went" in (folder / "report.html").read_text()


def test_projected_generations_differ_from_plain_ones(finished):
    folder, _, _ = finished
    plain, projected = (
        spd.generation.read_generations(folder / "gsm8k" / "generations" / f"{name}.jsonl")
        for name in ("plain", "projected")
    )
    assert len(plain) == len(projected) == 24
    assert [g.prompt for g in plain] == [g.prompt for g in projected]
    assert [g.completion for g in plain] != [g.completion for g in projected]


def test_the_report_is_self_contained(finished):
    folder, scores, _ = finished
    page = (folder / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|img)\b", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|file:)""", page)
    assert page.count("<svg") == 3
    for score in scores:
        assert f"{100 * score.evaluation.accuracy:.1f}" in page
    for wanted in ("n = 6", "Seconds by stage", "energy kept", "training.learning_rate", "Text before and after"):
        assert wanted in page


def test_the_report_escapes_what_models_and_records_say(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    path = folder / "gsm8k" / "evaluations" / "spd" / "gsm8k.scored.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["completion"] = "<script>alert(1)</script>"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(folder).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_finished_run_started_again_does_no_work(finished, checkpoint, made_records, monkeypatch):
    folder, scores, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    monkeypatch.setattr("spd.stages.calibrate", None)
    monkeypatch.setattr("spd.decoding.Decoder.__call__", None)
    monkeypatch.setattr("spd.distillation._train", None)
    again = run(config_for(checkpoint, made_records), folder, progress=False)
    assert [score.to_dict() for score in again] == [score.to_dict() for score in scores]
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before


def test_a_folder_of_another_configuration_is_refused(finished, checkpoint, made_records):
    changed = config_for(checkpoint, made_records, training={"epochs": 3, "learning_rate": 1e-3}, seed=7)
    with pytest.raises(spd.InputError, match=r"another configuration \(different: seed, training.epochs"):
        run(changed, finished[0], progress=False)


def test_batch_sizes_and_the_device_may_change(finished, checkpoint, made_records):
    generation = {"max_new_tokens": 12, "batch_size": 2}
    changed = config_for(checkpoint, made_records, generation=generation, device="cpu")
    assert len(run(changed, finished[0], progress=False)) == 8


def test_what_a_kill_left_half_written_is_swept(checkpoint, made_records, tmp_path):
    for name in (".lock", ".config.json.abcd.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / "gsm8k" / ".projected.xyz.tmp").mkdir(parents=True)
    (tmp_path / "gsm8k").rename(tmp_path / ".gsm8k")
    run(config_for(checkpoint, made_records), tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_is_no_run_is_refused(checkpoint, made_records, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(spd.InputError, match="not empty and holds no run"):
        run(config_for(checkpoint, made_records), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "missing"), ("", "not as a run keeps it"), ('{"arms": 5}', "not as a run keeps it")]
)
def test_without_its_configuration_a_run_asks_for_it_and_then_goes_on(
    finished, checkpoint, made_records, tmp_path, content, said
):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(spd.InputError, match=rf"^{folder}/config\.json: {said}.*; put it back"):
        run(config_for(checkpoint, made_records), folder, progress=False)
    shutil.copyfile(finished[0] / "config.json", folder / "config.json")
    assert len(run(config_for(checkpoint, made_records), folder, progress=False)) == len(finished[1])


def test_how_a_manifest_is_laid_out_changes_nothing(finished, checkpoint, made_records, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    manifest = folder / "gsm8k" / "subspace" / "subspace.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    assert len(run(config_for(checkpoint, made_records), folder, progress=False)) == len(finished[1])


def test_further_rounds_in_half_precision_are_refused_before_the_first(checkpoint, made_records, tmp_path):
    config = config_for(checkpoint, made_records, dtype="bfloat16", arms=["self-training", "spd:rounds=2"])
    with pytest.raises(spd.InputError, match="bfloat16, in which an adapter's small updates vanish"):
        run(config, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_two_runs_do_not_share_a_folder(checkpoint, made_records, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(spd.InputError, match="in use by another run"):
        run(config_for(checkpoint, made_records), tmp_path, progress=False)


def test_several_capabilities_share_the_base_evaluation(checkpoint, made_records, tmp_path):
    config = config_for(checkpoint, made_records, tasks=["gsm8k", "svamp"])
    scores = run(config, tmp_path / "run", progress=False)
    assert [(score.capability, score.arm) for score in scores[::2]] == [
        (None, "base"),
        *[(name, arm) for name in ("gsm8k", "svamp") for arm in ARMS[1:]],
    ]


def lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines()) if path.exists() else []


@pytest.mark.slow  # tests/torture kills one run oftener, and in `make test` too
def test_killed_in_generation_and_in_training_it_ends_as_if_undisturbed(checkpoint, made_records, tmp_path):
    """SIGKILL, twice, to a run in a process of its own."""
    training = "epochs = 15\nbatch_size = 2\nlearning_rate = 1e-3"  # 180 steps: one checkpoint to resume from
    (tmp_path / "run.toml").write_text(
        f'model = "{checkpoint}"\ndata = "{made_records}"\ntasks = ["gsm8k"]\n'
        f"[calibration]\nexamples = 12\n[generation]\nmax_new_tokens = 40\nbatch_size = 1\n"
        f"[training]\n{training}\n[evaluation]\nmax_new_tokens = 8\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "spd", "run", str(tmp_path / "run.toml"), "--out", str(tmp_path / name), "-q"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def kill_once(process: subprocess.Popen, reached) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()

    disturbed = tmp_path / "disturbed" / "gsm8k"
    plain, work = disturbed / "generations" / "plain.jsonl", disturbed / "adapters" / "plain.checkpoints"
    kill_once(start("disturbed"), lambda: len(lines(plain)) >= 3)
    assert 3 <= len(lines(plain)) < 24
    kill_once(start("disturbed"), lambda: list(work.glob("checkpoint-*/complete")))
    assert not (disturbed / "adapters" / "plain").exists()

    for process in (start("undisturbed"), start("disturbed")):
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors.decode()
    undisturbed = tmp_path / "undisturbed" / "gsm8k"
    for name in ("plain", "projected"):
        assert lines(disturbed / "generations" / f"{name}.jsonl") == lines(
            undisturbed / "generations" / f"{name}.jsonl"
        )
        weights = [folder / "adapters" / name / "adapter_model.safetensors" for folder in (disturbed, undisturbed)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    metrics = [(tmp_path / name / "metrics.json").read_text() for name in ("disturbed", "undisturbed")]
    assert metrics[0] == metrics[1]
    assert not work.exists()


def test_a_run_on_the_real_records(records, make_model, tokenizer, tmp_path):
    make_model("qwen2", max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = config_for(
        tmp_path / "model",
        records,
        calibration={"examples": 8, "max_length": 2048},  # the fixture's tokens are little more than bytes
        generation={"prompts": 12, "max_new_tokens": 16},
        training={"epochs": 1},
        evaluation={"questions": 4, "max_new_tokens": 16},
    )
    scores = run(config, tmp_path / "run", progress=False)
    assert [(score.arm, score.evaluation.n) for score in scores] == [(arm, 4) for arm in ARMS for _ in range(2)]
    provenance = json.loads((tmp_path / "run" / "gsm8k" / "subspace" / "subspace.json").read_text())["provenance"]
    assert (provenance["examples"], provenance["examples_without_span"]) == (8, [])


def test_a_subspace_of_an_unknown_task_is_refused_at_once(checkpoint, made_records, tmp_path):
    config = config_for(checkpoint, made_records, arms=["spd", "spd:from=gsmk8"])
    with pytest.raises(spd.InputError, match="did you mean 'gsm8k'"):
        run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
