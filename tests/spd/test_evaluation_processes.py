"""Several processes on one evaluation: each takes a share, all get the whole, one judges and writes."""

import json
import os
import socket
import subprocess
import sys

import pytest

import spd
from spd.likelihood import completion_nll

WORKER = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
import torch
torch.set_num_threads(1)
import spd
from spd import distributed
from spd.likelihood import completion_nll

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])  # nobody joins the processes but `evaluate`
model, tokenizer = spd.load_model("proving-ground")
rows, judged = [], []
model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
found = {}

task = spd.load_task("choice")
judge = task.judge
task.judge = lambda *given: judged.append(len(given[0])) or judge(*given)
for by in ("likelihood", "generation"):
    del rows[:]
    evaluation = spd.evaluate(
        model, tokenizer, task, limit=21, batch_size=4, answer_by=by, out=folder / f"{by}.jsonl", progress=False
    )
    found[by] = [asdict(answer) for answer in evaluation.answers]
    found[f"{by} rows"] = list(rows)
found["judged"] = judged

pairs = [(question.prompt, " B") for question in task.test()[:13]]
del rows[:]
found["nlls"] = [each.nll for each in completion_nll(model, tokenizer, pairs, batch_size=4, progress=False)]
found["nll rows"] = list(rows)

try:
    task.judge = lambda *given: 1 / 0
    spd.evaluate(model, tokenizer, task, limit=2, answer_by="likelihood", progress=False)
except (ZeroDivisionError, RuntimeError) as error:
    found["failed"] = type(error).__name__
(folder / f"{rank}.json").write_text(json.dumps(found))
distributed.leave()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder)],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("answer_by", ["likelihood", "generation"])
def test_all_get_what_one_process_finds(answer_by, two):
    folder, (first, second) = two
    model, tokenizer = spd.load_model("proving-ground")
    task = spd.load_task("choice")
    alone = spd.evaluate(model, tokenizer, task, limit=21, batch_size=4, answer_by=answer_by, progress=False)
    expected = [(answer.prompt, answer.completion, answer.correct) for answer in alone.answers]
    for found in (first, second):
        assert [(each["prompt"], each["completion"], each["correct"]) for each in found[answer_by]] == expected
    scored = [json.loads(line) for line in (folder / f"{answer_by}.scored.jsonl").read_text().splitlines()]
    assert scored == first[answer_by]
    written = [json.loads(line) for line in (folder / f"{answer_by}.jsonl").read_text().splitlines()]
    assert sorted(each["index"] for each in written) == list(range(21))


def test_the_work_is_shared(two):
    _, (first, second) = two
    assert sum(first["likelihood rows"]) + sum(second["likelihood rows"]) == 21
    assert (len(first["likelihood rows"]), len(second["likelihood rows"])) == (3, 3)
    assert sum(first["nll rows"]) + sum(second["nll rows"]) == 13
    assert abs(len(first["nll rows"]) - len(second["nll rows"])) <= 1


def test_one_judges(two):
    _, (first, second) = two
    assert (first["judged"], second["judged"]) == ([21, 21], [])


def test_likelihoods_are_those_of_one_process(two):
    _, (first, second) = two
    model, tokenizer = spd.load_model("proving-ground")
    pairs = [(question.prompt, " B") for question in spd.load_task("choice").test()[:13]]
    alone = [each.nll for each in completion_nll(model, tokenizer, pairs, progress=False)]
    assert first["nlls"] == second["nlls"] == pytest.approx(alone, rel=1e-5)


def test_none_waits_for_one_that_failed(two):
    _, (first, second) = two
    assert (first["failed"], second["failed"]) == ("ZeroDivisionError", "RuntimeError")
