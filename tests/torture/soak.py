"""Ten thousand short prompts through the whole method, the memory of the process watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.torture.sittings import end_with_parent
from tests.torture.trials import Tally, scratch

PROMPTS = 10_000
QUESTIONS = 1_000
GROWTH = 0.05
"""Memory is flat if the median of a stage's last third is within this share of that of its middle third."""
_STAGES = ("generate", "distill", "evaluate")
_CONFIG = """\
model = "proving-ground"
tasks = ["{task}"]
arms = ["spd"]
[calibration]
examples = 32
[generation]
max_new_tokens = 6
batch_size = 64
[training]
learning_rate = 1e-3
epochs = 1
batch_size = 32
[evaluation]
max_new_tokens = 6
batch_size = 64
"""


@dataclass(frozen=True)
class Soak:
    """One trial; `prompts` says how long."""

    kind: str = "soak"
    prompts: int = PROMPTS

    def run(self, bench: object = None) -> Tally:
        tally = Tally(self.kind, tried=1)
        with scratch() as folder:
            (folder / "sums").mkdir()
            questions = min(QUESTIONS, self.prompts)
            _write_task(folder / "sums", self.prompts, questions)
            (folder / "run.toml").write_text(_CONFIG.format(task=folder / "sums"))
            status, said, samples = _watched(folder)
            wrong = (
                [f"status {status}: {said[-2000:]}"]
                if status
                else _unaccounted(folder / "run", self.prompts, questions)
            )
            wrong += [] if status else _growth(samples)
            if wrong:
                tally.lose(f"soak: {'; '.join(wrong)}")
            else:
                tally.resumed += 1
        return tally


def _write_task(folder: Path, prompts: int, questions: int) -> None:
    """Sums of two numbers; each prompt once."""
    pairs = [(first, second) for first in range(10, 10 + prompts // 90 + 2) for second in range(10, 110)]

    def record(pair: tuple[int, int]) -> str:
        total = str(sum(pair))
        prompt = f"Tom has {pair[0]} eggs and Ann has {pair[1]} eggs. How many eggs?\n"
        return json.dumps({"prompt": prompt, "completion": f"#### {total}", "spans": [total]}) + "\n"

    (folder / "train.jsonl").write_text("".join(map(record, pairs[:prompts])))
    (folder / "test.jsonl").write_text("".join(map(record, pairs[prompts : prompts + questions])))
    (folder / "task.toml").write_text(f"test_size = {questions}\n")


def _watched(folder: Path) -> tuple[int, str, list[tuple[str, int]]]:
    """Exit status, standard error, and the resident bytes every quarter second with the stage they were seen in."""
    command = [sys.executable, "-m", "spd", "run", str(folder / "run.toml"), "--out", str(folder / "run")]
    samples: list[tuple[str, int]] = []
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=end_with_parent)
        while process.poll() is None:
            resident = _resident(process.pid)
            if resident:
                samples.append((_stage((folder / "said").read_text(errors="replace")), resident))
            time.sleep(0.25)
        said.seek(0)
        return process.returncode, said.read(), samples


def _stage(said: str) -> str:
    """The last stage that the command has announced, by its line: "generate: sums, projected"."""
    lines = [
        line for line in said.splitlines() if line.partition(":")[0].isalpha() and ": " in line and "%" not in line
    ]
    return lines[-1] if lines else ""


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _growth(samples: list[tuple[str, int]]) -> list[str]:
    stages: dict[str, list[int]] = defaultdict(list)
    for stage, resident in samples:
        stages[stage].append(resident)
    found = []
    for stage, sizes in stages.items():
        third = len(sizes) // 3
        if not stage.startswith(_STAGES) or third < 4:
            continue
        middle, last = median(sizes[third : 2 * third]), median(sizes[-third:])
        if last > (1 + GROWTH) * middle:
            found.append(f"{stage}: memory grows, {middle / 2**20:.0f} MiB and then {last / 2**20:.0f} MiB")
    return found


def _unaccounted(run: Path, prompts: int, questions: int) -> list[str]:
    """What is not there exactly once."""
    found = []
    task = json.loads((run / "config.json").read_text())["tasks"][0]
    name = Path(task).name
    held = {
        "completions": (run / name / "generations" / "projected.jsonl", prompts),
        "answers of the base": (run / "base" / "evaluations" / f"{name}.jsonl", questions),
        "answers of spd": (run / name / "evaluations" / "spd" / f"{name}.jsonl", questions),
    }
    for what, (path, count) in held.items():
        indexes = sorted(json.loads(line)["index"] for line in path.read_text().splitlines())
        if indexes != list(range(count)):
            found.append(f"{what}: {len(indexes)} of {count}, {len(set(indexes))} of them different")
    trained = json.loads((run / name / "adapters" / "projected" / "training.json").read_text())["examples"]
    judged = [score["n"] for score in json.loads((run / "metrics.json").read_text())]
    if trained != prompts:
        found.append(f"trained on {trained} of {prompts}")
    if judged != [questions, questions]:
        found.append(f"judged {judged} of {questions} each")
    return found
