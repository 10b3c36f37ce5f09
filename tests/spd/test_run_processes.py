"""`spd run` by two processes of torchrun comes to what one process comes to, also where it was killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd.config import load_config
from spd.run import run

ROOT = Path(__file__).parents[2]
TINY = """
model = "proving-ground"
tasks = ["words"]
evaluate = ["words", "choice"]
arms = ["base", "projected", "spd", "spd:subspace=activations"]
[calibration]
examples = 6
[generation]
prompts = 11
max_new_tokens = 8
batch_size = {batch_size}
[training]
epochs = 1
learning_rate = 3e-3
lora_dropout = 0.0
[evaluation]
questions = 5
max_new_tokens = 8
batch_size = {batch_size}
by_likelihood = ["choice"]
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`settings(batch_size)`: the configuration's file."""
    folder = tmp_path_factory.mktemp("settings")

    def write(batch_size: int) -> Path:
        path = folder / f"{batch_size}.toml"
        path.write_text(TINY.format(batch_size=batch_size))
        return path

    return write


@pytest.fixture(scope="module")
def alone(settings: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`alone(deterministic)`: the folder of a run by this process."""
    made: dict[bool, Path] = {}

    def of_one(deterministic: bool) -> Path:
        if deterministic not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            config = load_config(settings(4)).model_copy(update={"deterministic": deterministic})
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as many as each of the processes has
            try:
                run(config, folder, progress=False)
            finally:
                torch.set_num_threads(threads)
            made[deterministic] = folder
        return made[deterministic]

    return of_one


@contextmanager
def started(config: Path, folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`spd run` by two processes; none of them is left afterwards."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "spd", "run", str(config), "--out", str(folder), "--quiet", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to torchrun and to its workers, which are in sessions of their own."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for worker in map(int, workers):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def carried_out(config: Path, folder: Path, *options: str) -> None:
    with started(config, folder, *options) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()[-3000:]


def files(folder: Path) -> list[str]:
    """What a run leaves, but for the profile; the file of a subspace is called after what it holds."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.partition("subspace-")[0] for path in paths if not path.startswith(".") and path != "profile.json"
    )


def completions(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jsonl")}


def assert_same_run(folder: Path, other: Path) -> None:
    assert files(folder) == files(other)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text())
    expected = completions(other)
    assert len(expected) == 2 + 2 * 8  # both arms' generations; answers and verdicts, of two tests by four models
    assert completions(folder) == expected
    adapters = sorted(other.rglob("adapter_model.safetensors"))
    assert len(adapters) == 2
    for adapter in adapters:
        expected_weights, weights = load_file(adapter), load_file(folder / adapter.relative_to(other))
        assert any(value.abs().max() > 1e-3 for name, value in weights.items() if "lora_B" in name)
        for name, value in expected_weights.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_two_processes_come_to_what_one_comes_to(alone, settings, tmp_path):
    carried_out(settings(4), tmp_path / "run")
    assert_same_run(tmp_path / "run", alone(False))


@pytest.mark.slow
def test_killed_and_started_again_it_comes_to_the_same_with_another_batch_size(alone, settings, tmp_path):
    """Deterministic, profiled, and killed while it wrote completions."""
    folder = tmp_path / "run"
    with started(settings(2), folder, "--deterministic", "--profile") as process:
        while not any(path.stat().st_size for path in folder.glob("words/generations/*.shard-*.jsonl")):
            assert process.poll() is None, process.communicate()[0].decode()[-3000:]
            time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    carried_out(settings(2), folder, "--deterministic", "--profile")
    assert_same_run(folder, alone(True))
    stages = json.loads((folder / "profile.json").read_text())["stages"]
    assert {"calibrate", "generate", "distill", "evaluate"} <= {stage["kind"] for stage in stages}
