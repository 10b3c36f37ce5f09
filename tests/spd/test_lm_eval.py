"""The tasks for lm-evaluation-harness: what it reports on an exported checkpoint is what this package finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

import spd
import spd.lm_eval
from spd.export import export_folded
from spd.likelihood import completion_nll
from spd.tasks.bbh import PUBLISHED_NUMBER

FOLDER = Path(spd.lm_eval.__file__).parent
NAMES = {"spd_gsm8k", "spd_svamp", "spd_bbh", "spd_mmlu", "spd_codealpaca"}


def test_the_folder_is_told_and_holds_the_tasks():
    told = subprocess.run([sys.executable, "-m", "spd.lm_eval"], capture_output=True, text=True, check=True)
    assert Path(told.stdout.strip()) == FOLDER
    assert {path.stem for path in FOLDER.glob("*.yaml")} == NAMES


def test_the_functions_that_the_tasks_name_are_there_and_judge():
    from spd.lm_eval import rules

    for path in FOLDER.glob("*.yaml"):
        for line in path.read_text().splitlines():
            if "!function" in line:
                assert callable(getattr(rules, line.rpartition("spd.lm_eval.rules.")[2]))
    record = {"question": "How many?", "answer": "2 + 2 = 4\n#### 4"}
    assert rules.gsm8k_prompt(record) == "Question: How many?\nAnswer:"
    assert rules.gsm8k_score(record, [" so 4.00"]) == {"acc": 1.0}
    assert rules.gsm8k_score(record, [" 4 is not 5"]) == {"acc": 0.0}
    assert rules.bbh_score({"input": "?", "target": "(B)"}, [" the answer is (B)."]) == {"acc": 1.0}
    assert rules.codealpaca_score({"output": "abc"}, [(-6.0, False)]) == {"nll_per_byte": 1.5}


def test_the_sub_tasks_are_those_of_the_package():
    text = (FOLDER / "spd_bbh.yaml").read_text()
    assert [name for name in PUBLISHED_NUMBER if f"test: bbh/{name}.jsonl" in text] == list(PUBLISHED_NUMBER)


@pytest.fixture(scope="module")
def data(made_records):
    """The made records, and some for the other tasks."""
    made = {
        "bbh": {
            name: [{"input": f"Is {n} more than 3?", "target": "Yes" if n > 3 else "No"} for n in range(3)]
            for name in PUBLISHED_NUMBER
        },
        "mmlu": {
            "test": [
                {
                    "question": f"{n} and 1?",
                    "subject": "sums",
                    "choices": [str(n + k) for k in range(4)],
                    "answer": n % 4,
                }
                for n in range(8)
            ]
        },
        "codealpaca": {
            "train": [{"instruction": f"Print {n}.", "input": "", "output": f"print({n})"} for n in range(103)]
        },
    }
    for task, files in made.items():
        (made_records / task).mkdir(exist_ok=True)
        for name, records in files.items():
            (made_records / task / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return made_records


def test_the_harness_reports_what_the_package_finds(data, checkpoint, subspace_of, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")
    model, tokenizer = spd.load_model(checkpoint)
    folded = export_folded(checkpoint, subspace_of(model), tmp_path / "folded")
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={folded},dtype=float32", "--include_path", str(FOLDER)),
        *("--tasks", ",".join(sorted(NAMES)), "--output_path", str(tmp_path / "results.json"), "--log_samples"),
        *("--gen_kwargs", "max_gen_toks=16"),
    ]
    path = os.pathsep.join(filter(None, (str(FOLDER.parents[1]), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path}
    environment = os.environ | offline
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=data, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(next(tmp_path.glob("results*.json")).read_text())["results"]

    projected, _ = spd.load_model(folded)
    for name in ("gsm8k", "svamp"):
        task = spd.load_task(name, data)
        own = spd.evaluate(projected, tokenizer, task, max_new_tokens=16, progress=False)
        assert found[f"spd_{name}"]["acc,none"] == own.accuracy
        samples = [json.loads(line) for line in next(tmp_path.glob(f"samples_spd_{name}*")).read_text().splitlines()]
        assert [each["arguments"]["gen_args_0"]["arg_0"] for each in samples] == [q.prompt for q in task.test()]
        assert [each["resps"][0][0] for each in samples] == [answer.completion for answer in own.answers]
    questions = spd.load_task("codealpaca", data).test()
    pairs = [(question.prompt.rstrip(), f"\n{question.reference}") for question in questions]
    likelihoods = completion_nll(projected, tokenizer, pairs, progress=False)
    expected = fmean(each.nll / len(text.encode()) for each, (_, text) in zip(likelihoods, pairs, strict=True))
    assert found["spd_codealpaca"]["nll_per_byte,none"] == pytest.approx(expected, rel=1e-3)

    asked = spd.load_task("mmlu", data).test()
    options = [(question.prompt, f" {letter}") for question in asked for letter in "ABCD"]
    surprise = [each.nll for each in completion_nll(projected, tokenizer, options, progress=False)]
    chosen = ["ABCD"[min(range(4), key=surprise[4 * row : 4 * row + 4].__getitem__)] for row in range(len(asked))]
    right = [letter == question.reference for letter, question in zip(chosen, asked, strict=True)]
    assert found["spd_mmlu"]["acc,none"] == fmean(right) > 0
    assert {name for name in found if name.startswith("spd_bbh::")} == {f"spd_bbh::{name}" for name in PUBLISHED_NUMBER}
    assert found["spd_bbh"]["sample_len"] == 18
