"""Calibration by several processes: the same subspace for any number of them, and no process that waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spd import distributed

Found = dict[str, Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(checkpoint: Path, examples, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Found]]:
    """`found(job, processes)`: what each process came to in a job of processes.py."""
    folder = tmp_path_factory.mktemp("processes")
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    given = [[example.prompt, example.completion, list(example.spans)] for example in examples]
    (folder / "examples.json").write_text(json.dumps(given))
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "processes.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return lambda job, size: [torch.load(folder / f"{job}-{size}-{number}.pt") for number in range(size)]


def assert_same_subspace(one: Found, other: Found, atol: float) -> None:
    assert one["bases"].keys() == other["bases"].keys()
    for place, (basis, singular_values) in one["bases"].items():
        other_basis, other_values = other["bases"][place]
        torch.testing.assert_close(basis @ basis.T, other_basis @ other_basis.T, rtol=0, atol=atol)
        torch.testing.assert_close(singular_values, other_values, rtol=0, atol=atol * float(singular_values[0]))


@pytest.mark.parametrize(
    ("job", "size", "reference"),
    [
        ("plain", 2, "plain"),
        ("plain", 3, "plain"),
        ("one_batch", 3, "one_batch"),
        ("sharded", 2, "plain"),
        ("sharded", 3, "plain"),
        ("sharded_after_training", 2, "plain"),
        ("sharded_and_checkpointed", 2, "plain"),
    ],
)
def test_the_subspace_is_that_of_one_process(job, size, reference, found):
    """Whole models and sharded ones, processes without an example included; every process has the very same one."""
    alone = found(reference, 1)[0]
    together = found(job, size)
    for each in together:
        assert_same_subspace(alone, each, atol=1e-5)
        assert each["provenance"] == alone["provenance"]
        for place, (basis, singular_values) in together[0]["bases"].items():
            assert torch.equal(basis, each["bases"][place][0])
            assert torch.equal(singular_values, each["bases"][place][1])


def test_the_tolerance_tells_other_examples_apart(found):
    """The control: the subspace of two of the examples is another one."""
    with pytest.raises(AssertionError):
        assert_same_subspace(found("plain", 1)[0], found("one_batch", 1)[0], atol=1e-5)


def test_sharded_models_in_half_precision_scale_their_loss_together(found):
    alone = found("half", 1)[0]
    for each in found("half", 2):
        for place, (basis, _) in alone["bases"].items():
            assert float(torch.linalg.svdvals(basis.T @ each["bases"][place][0])[-1]) > 0.99


def test_warnings_are_the_first_processs(found):
    first, *others = (each["warned"] for each in found("one_batch", 3))
    assert len(first) == 1 and "1 of 3 examples have no surviving span" in first[0]
    assert others == [[], []]


def test_a_sharded_model_is_left_as_it_was(found):
    for each in found("sharded", 2):
        assert each["kept"] == {"flags": True, "training": True, "gradients": [], "hooks": []}
        assert each["rows_of_one"] > 0
    assert all(each["gradients"] == [] for each in found("sharded_after_training", 2))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("poisoned", "InputError: examples: the gradient at K of layer 1 is NaN or infinite for example 4"),
        ("sharded_poisoned", "InputError: examples: the gradient at K of layer 1 is NaN or infinite for example 4"),
        ("no_examples_in_one", "InputError: examples: expected at least one"),
        ("other_examples", "InputError: examples: expected the same in all 2 processes, got another in rank [1]"),
        ("other_settings", "InputError: settings: expected the same in all 2 processes, got another in rank [1]"),
        ("other_weights", "InputError: model: expected the same in all 2 processes, got another in rank [1]"),
    ],
)
def test_what_is_wrong_in_one_process_is_reported_by_all(job, message, found):
    for each in found(job, 2):
        assert each["error"].startswith(message)


def test_a_failure_of_another_kind_ends_all_processes(found):
    first, second = found("a_bug_in_one", 2)
    assert second["error"].startswith("TypeError")
    assert first["error"].startswith("RuntimeError: rank 1 failed with TypeError")


def test_what_the_first_process_does_alone_all_come_to_know(found):
    assert found("on_main", 2) == [{"from": 0, "error": "no space left"}] * 2


def test_other_wrappers_are_refused_by_name(found):
    for each in found("wrapped", 2):
        replicated, flattened = each["error"]
        assert replicated.startswith("InputError") and "DistributedDataParallel" in replicated
        assert flattened.startswith("InputError") and "FullyShardedDataParallel" in flattened


def test_without_processes_everything_is_that_of_one():
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("value") == ["value"] and distributed.broadcast("value") == "value"
    assert distributed.on_main(lambda: "value") == "value"
    distributed.check_same("value", object())
    with pytest.raises(KeyError, match="own"), distributed.failing_together():
        raise KeyError("own")


def test_one_gpu_is_not_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.join()
    assert not torch.distributed.is_initialized()
