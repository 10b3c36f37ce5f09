"""Commands and programs that torchrun starts: the work is shared, and what goes wrong is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spd
from spd.cli.processes import said_by_another

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow  # test_run_processes.py has the whole run
def test_the_command_under_torchrun(checkpoint, made_records, tmp_path):
    """Two processes: one subspace, written once, the same as without them, and one table."""
    given = ["calibrate", "-m", checkpoint, "-t", "gsm8k", "--data", made_records, "--examples", "12"]
    result = torchrun("-m", "spd", *given, "--batch-size", "4", "--out", tmp_path / "subspace")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("gsm8k on") == 1
    found = spd.Subspace.from_pretrained(tmp_path / "subspace")
    examples = spd.load_task("gsm8k", made_records).calibration()[:12]
    expected = spd.calibrate(*spd.load_model(checkpoint), examples, batch_size=4, progress=False)
    assert found.provenance == expected.provenance
    for side in "kv":
        for layer, basis in expected.side(side).items():
            other = found.side(side)[layer].basis
            torch.testing.assert_close(basis.basis @ basis.basis.T, other @ other.T, rtol=0, atol=1e-5)


PROGRAM = """
import json, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
import spd
from spd import distributed
from spd.cli.app import _quieten_libraries
from spd.cli.processes import together
from spd.memory import FittingBatches

_quieten_libraries()

folder = Path(sys.argv[1])
given = [spd.Example(*each) for each in json.loads((folder / "examples.json").read_text())]
model, tokenizer = spd.load_model(sys.argv[2])
passes = []
model.register_forward_hook(lambda *_: passes.append(1))
subspace = spd.calibrate(model, tokenizer, given, batch_size=2, progress=False)
basis = subspace.k[subspace.layers[0]].basis
found = {"processes": distributed.size(), "passes": len(passes), "sum": float(basis.sum())}
(folder / f"{distributed.rank()}.json").write_text(json.dumps(found))

def fail(part):
    if len(part) > 1:
        raise MemoryError
    return part

with together() as main:
    warnings.warn("something else")
    if not main:
        list(FittingBatches(2, caller="generate", unit="prompts").run([1, 2], fail))
"""


def test_a_program_need_not_join_and_whichever_process_is_short_of_memory_says_so(checkpoint, examples, tmp_path):
    given = [[example.prompt, example.completion, list(example.spans)] for example in examples]
    (tmp_path / "examples.json").write_text(json.dumps(given))
    (tmp_path / "program.py").write_text(PROGRAM)
    result = torchrun(tmp_path / "program.py", tmp_path, checkpoint)
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert (first["processes"], first["passes"]) == (2, len(examples) // 4)
    assert sorted(line for line in result.stderr.splitlines() if line.startswith("warning: ")) == [
        "warning: rank 1: generate: 2 prompts at a time do not fit in memory; going on with 1",
        "warning: something else",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"-t": "gsm9k"}, "spd: task: there is no"),  # before the processes have joined
        ({"--layers": "99"}, "spd: layers: "),  # told by each to the others
    ],
    ids=["task", "layers"],
)
def test_a_refusal_under_torchrun_is_one_line(change, message, checkpoint, made_records, tmp_path):
    given = {"-m": checkpoint, "-t": "gsm8k", "--data": made_records, "--out": tmp_path / "subspace"} | change
    result = torchrun("-m", "spd", "calibrate", *(each for pair in given.items() for each in pair))
    assert result.returncode != 0
    assert result.stderr.count(message) == 1, result.stderr[-2000:]


def test_without_a_job_nobody_else_says_it():
    assert not said_by_another("a line") and not said_by_another("a line")


def test_another_processs_gpu_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(spd.InputError, match=r'^device: expected "cuda" under torchrun, .* got .cuda:1'):
        spd.load_model(checkpoint, device="cuda:1")
