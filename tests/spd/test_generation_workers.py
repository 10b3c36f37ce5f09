"""Several workers on one list of prompts: nothing twice, nothing lost, one file at the end, whoever is killed when."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import spd
from spd import completions
from spd.completions import CompletionsFile, read_generations, shard_files
from spd.lock import locked

ROOT = Path(__file__).parents[2]
SETTINGS = {"prompts": 6}
PROMPTS = [f"prompt {number}" for number in range(6)]


def sample(model, tokenizer, prompts, **changes):
    settings = {"max_new_tokens": 6, "batch_size": 3, "temperature": 1.0, "progress": False}
    return spd.generate(model, tokenizer, prompts, **(settings | changes))


def completion(index):
    return completions.Generation(index, PROMPTS[index], f" text {index}", [1, index], False)


def store(folder, shard=(0, 1)):
    return CompletionsFile(folder / "g.jsonl", SETTINGS, PROMPTS, shard)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def expected(model, tokenizer, prompts):
    return sample(model, tokenizer, prompts)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_workers_share_the_prompts_and_the_last_brings_all_together(
    count, expected, model, tokenizer, prompts, tmp_path
):
    """Of nine workers for seven batches two have nothing to do."""
    out = tmp_path / "g.jsonl"
    last, taken = min(count, 7) - 1, []
    for number in range(count):
        found = sample(model, tokenizer, prompts, out=out, shard=(number, count))
        if number < last:
            assert found == [expected[each.index] for each in found]
            taken += [each.index for each in found]
            with pytest.raises(spd.InputError, match="workers have not all finished"):
                read_generations(out)
        else:
            assert found == expected
    assert len(taken) == len(set(taken)) < len(prompts)
    assert read_generations(out) == expected
    assert names(tmp_path) == ["g.jsonl", "g.settings.json"]
    sample(model, tokenizer, prompts, out=tmp_path / "alone.jsonl")
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_without_a_file_a_worker_returns_its_share(expected, model, tokenizer, prompts):
    shares = [sample(model, tokenizer, prompts, shard=(number, 2)) for number in range(2)]
    assert sorted(shares[0] + shares[1], key=lambda each: each.index) == expected


def test_another_number_of_workers_goes_on_from_what_is_there(
    expected, model, tokenizer, prompts, tmp_path, monkeypatch
):
    """Three workers, of whom one is never started and one killed; then two; then one alone."""
    out, made = tmp_path / "g.jsonl", []
    append = CompletionsFile.append

    def counted(self, generations):
        append(self, generations)
        made.extend(each.index for each in generations)
        if len(made) == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(CompletionsFile, "append", counted)
    killed_at = 3
    with pytest.raises(KeyboardInterrupt):
        sample(model, tokenizer, prompts, out=out, shard=(0, 3))
    killed_at = None
    sample(model, tokenizer, prompts, out=out, shard=(1, 3))
    sample(model, tokenizer, prompts, out=out, shard=(1, 2))
    assert len(shard_files(out)) == 3
    assert sample(model, tokenizer, prompts, out=out) == expected == read_generations(out)
    assert sorted(made) == list(range(len(prompts))), "nothing twice"
    assert names(tmp_path) == ["g.jsonl", "g.settings.json"]


@pytest.mark.parametrize("count", [1, 2])
def test_deterministic_bytes_do_not_depend_on_the_workers(count, model, tokenizer, prompts, tmp_path):
    many = [f"{prompt} {number}" for number in range(4) for prompt in prompts]
    alone = sample(model, tokenizer, many, deterministic=True, batch_size=7)
    for number in range(count):
        found = sample(model, tokenizer, many, out=tmp_path / "g.jsonl", deterministic=True, shard=(number, count))
    assert found == alone


KILLED = """
import json, os, signal, sys
from pathlib import Path
from spd.completions import CompletionsFile

folder, moment, settings, prompts = json.loads(sys.argv[1])
unlink, removed = Path.unlink, []

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def unlink_until(path, **kwargs):
    if path.suffix == ".jsonl":
        removed.append(path)
        if len(removed) == {"first unlink": 1, "second unlink": 2}[moment]:
            die()
    unlink(path, **kwargs)

with CompletionsFile(Path(folder) / "g.jsonl", settings, prompts, (1, 2)) as store:
    if moment == "replace":
        Path.replace = die
    elif moment == "fsync":
        os.fsync = die
    else:
        Path.unlink = unlink_until
    store.merge(range(6))
"""


@pytest.mark.parametrize("moment", ["fsync", "replace", "first unlink", "second unlink"])
@pytest.mark.parametrize("then", [(1, 2), (0, 2), (0, 3), (0, 1)])
def test_a_merge_that_is_killed_is_finished_by_whoever_comes(then, moment, tmp_path):
    """By SIGKILL: nothing runs any more, not even what tidies up."""
    for number in range(2):
        with store(tmp_path, (number, 2)) as worker:
            worker.append([completion(index) for index in range(number, 6, 2)])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps([str(tmp_path), moment, SETTINGS, PROMPTS])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert len(shard_files(tmp_path / "g.jsonl")) == (1 if moment == "second unlink" else 2)
    assert (tmp_path / "g.jsonl").exists() == moment.endswith("unlink")
    with store(tmp_path, then) as worker:
        assert worker.complete
        assert worker.merge(range(6))
    assert read_generations(tmp_path / "g.jsonl") == [completion(index) for index in range(6)]
    left = [name for name in names(tmp_path) if not name.endswith(".lock")]
    assert left == ["g.jsonl", "g.settings.json"]


def test_a_torn_line_of_another_worker_is_left_to_it(tmp_path):
    with store(tmp_path, (0, 2)) as worker:
        worker.append([completion(0), completion(2)])
    torn = tmp_path / "g.shard-0-of-2.jsonl"
    torn.write_bytes(torn.read_bytes()[:-5])
    before = torn.read_bytes()
    with store(tmp_path, (1, 2)) as worker:
        assert worker.done == {0: completion(0)}
        assert torn.read_bytes() == before
    with store(tmp_path, (0, 2)) as worker:
        assert worker.done == {0: completion(0)}
        worker.append([completion(2), completion(4)])
    with store(tmp_path, (1, 2)) as worker:
        assert sorted(worker.done) == [0, 2, 4]
        assert not worker.merge(range(6))
        worker.append([completion(index) for index in (1, 3, 5)])
        assert worker.merge(range(6))
    assert read_generations(tmp_path / "g.jsonl") == [completion(index) for index in range(6)]


@pytest.mark.parametrize(
    "line",
    [
        "torn in the mid",
        json.dumps({"index": -1, "prompt": PROMPTS[-1], "completion": "", "tokens": [], "finished": True}),
        json.dumps({"index": 1, "prompt": PROMPTS[0], "completion": "", "tokens": [], "finished": True}),
        json.dumps({"index": 1, "prompt": PROMPTS[1], "completion": "", "tokens": ["1"], "finished": True}),
        json.dumps({"index": 1, "prompt": PROMPTS[1], "completion": None, "tokens": [], "finished": True}),
        json.dumps({"index": 0, "prompt": PROMPTS[0], "completion": "again", "tokens": [], "finished": True}),
    ],
)
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_a_damaged_or_foreign_line_is_refused(shard, line, tmp_path):
    with store(tmp_path, (0, 2)) as worker:
        worker.append([completion(0)])
    damaged = tmp_path / "g.shard-0-of-2.jsonl"
    damaged.write_text(damaged.read_text() + line + "\n" + json.dumps({"index": 2})[:5])
    before = damaged.read_bytes()
    with (
        pytest.raises(spd.InputError, match=r"g\.shard-0-of-2\.jsonl, line 2: not a completion of these prompts"),
        store(tmp_path, shard),
    ):
        pass
    assert damaged.read_bytes() == before


def test_who_may_work_at_the_same_time(tmp_path):
    """Workers of one number, each once; nobody beside a process alone."""
    with store(tmp_path, (0, 2)):
        with store(tmp_path, (1, 2)):
            pass
        for refused in ((0, 2), (0, 3), (0, 1)):
            with pytest.raises(spd.InputError, match="in use by another run"), store(tmp_path, refused):
                pass
    with store(tmp_path, (0, 3)):
        pass
    with store(tmp_path), pytest.raises(spd.InputError, match="in use by another run"), store(tmp_path):
        pass


def test_workers_of_another_batch_size_are_refused_while_others_rely_on_theirs(
    expected, model, tokenizer, prompts, tmp_path
):
    """Else some prompts are nobody's, and all workers say that they are done."""
    out = tmp_path / "g.jsonl"
    sample(model, tokenizer, prompts, out=out, shard=(0, 2))
    with pytest.raises(spd.InputError, match=r"batch_size: .* was begun by 2 workers with 3, got 4; use the same"):
        sample(model, tokenizer, prompts, out=out, shard=(1, 2), batch_size=4)
    for number in range(3):
        found = sample(model, tokenizer, prompts, out=out, shard=(number, 3), batch_size=4)
    assert [each.index for each in found] == list(range(len(prompts)))
    sample(model, tokenizer, prompts, out=tmp_path / "alone.jsonl")
    settings = [tmp_path.joinpath(f"{name}.settings.json").read_bytes() for name in ("g", "alone")]
    assert settings[0] == settings[1], "it is forgotten when all is merged"
    with (
        store(tmp_path / "other", (0, 2)),
        CompletionsFile(tmp_path / "other" / "g.jsonl", SETTINGS, PROMPTS, (1, 2), batch_size=5),
    ):
        pass  # not said of the first: torchrun starts all with the same, and again with another


def test_nobody_reads_all_completions_while_others_wait(tmp_path, monkeypatch):
    """Of large files that takes longer than anyone waits."""
    with store(tmp_path, (0, 2)) as worker:
        worker.append([completion(index) for index in (0, 2, 4)])
    lines, looked = CompletionsFile._lines, []

    def slowly(self, path):
        with locked(self.path, "another worker"):
            looked.append(path.name)
        return lines(self, path)

    monkeypatch.setattr(CompletionsFile, "_lines", slowly)
    with store(tmp_path, (1, 2)) as worker:
        worker.append([completion(index) for index in (1, 3, 5)])
        assert worker.merge(range(6))
    assert looked == ["g.shard-0-of-2.jsonl", "g.shard-1-of-2.jsonl", "g.jsonl"]


@pytest.mark.parametrize("vanishing", ["g.shard-0-of-3.jsonl", "g.shard-1-of-3.jsonl", "g.shard-2-of-3.jsonl"])
def test_a_merge_while_another_reads_hides_nothing(vanishing, tmp_path, monkeypatch):
    """The worker reads on, file by file, while the files go one after the other into `out`."""
    for number in range(3):
        with store(tmp_path, (number, 3)) as worker:
            worker.append([completion(index) for index in range(number, 6, 3)])
    lines = CompletionsFile._lines

    def meanwhile(self, path):
        if path.name == vanishing:
            monkeypatch.setattr(CompletionsFile, "_lines", lines)
            with store(tmp_path, (1, 3)) as other:
                assert other.merge(range(6))
        return lines(self, path)

    monkeypatch.setattr(CompletionsFile, "_lines", meanwhile)
    with store(tmp_path, (0, 3)) as worker:
        assert sorted(worker.done) == list(range(6))
        assert worker.merge(range(6))
    assert names(tmp_path) == ["g.jsonl", "g.settings.json"]


def test_what_is_finished_is_read_without_a_lock(tmp_path, monkeypatch):
    """It may lie where nothing can be written."""
    with store(tmp_path) as alone:
        alone.append([completion(index) for index in range(6)])

    def refused(path, what):
        raise spd.InputError("cannot be locked")

    monkeypatch.setattr(completions, "locked", refused)
    for shard in ((0, 1), (1, 2)):
        with store(tmp_path, shard) as again:
            assert again.complete
            assert again.merge(range(6))
    out = tmp_path / "g.jsonl"
    out.write_bytes(out.read_bytes() + b"torn")
    with pytest.raises(spd.InputError, match="cannot be locked"), store(tmp_path):
        pass


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path):
    own = [".g.jsonl.abcd_123.tmp", ".g.settings.json.abcdefgh.tmp"]
    others = [".g.jsonl.v2.abcdefgh.tmp", ".h.jsonl.abcdefgh.tmp", ".g.jsonl.abcdefghi.tmp", "g.jsonl.tmp"]
    for name in (*own, *others):
        (tmp_path / name).touch()
    folder = tmp_path / ".g.jsonl.folded__.tmp" / "checkpoint"
    folder.mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work").touch()
    (folder / "link").symlink_to(tmp_path / "precious")
    (tmp_path / ".g.jsonl.link1234.tmp").symlink_to(tmp_path / "precious")
    with store(tmp_path):
        pass
    assert names(tmp_path) == sorted([*others, ".g.jsonl.link1234.tmp", "g.settings.json", "precious"])
    assert names(tmp_path / "precious") == ["work"]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "LONGEST", 1000)
    with store(tmp_path) as alone:
        alone.append([completion(0)])
    out = tmp_path / "g.jsonl"
    out.write_bytes(out.read_bytes() + b" " * 1001)
    with pytest.raises(spd.InputError, match=r"g\.jsonl, line 2: not a completion"), store(tmp_path):
        pass


def test_a_worker_waits_a_while_for_one_that_looks_around(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "PATIENCE", 0.3)
    with locked(tmp_path / "g.jsonl", "test"), pytest.raises(spd.InputError, match="in use"), store(tmp_path, (0, 2)):
        pass
    monkeypatch.setattr(completions, "PATIENCE", 30.0)
    held = threading.Event()

    def hold():
        with locked(tmp_path / "g.jsonl", "test"):
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with store(tmp_path, (0, 2)) as worker:
        assert worker.done == {}
    thread.join()


def test_what_is_written_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or fsync(file))
    with store(tmp_path) as alone:
        synced.clear()
        alone.append([completion(0)])
        assert synced == [alone.path.stat().st_size]


def test_files_of_other_settings_are_refused_by_every_worker(model, tokenizer, prompts, tmp_path):
    out = tmp_path / "g.jsonl"
    sample(model, tokenizer, prompts, out=out, shard=(0, 2))
    with pytest.raises(spd.InputError, match="another seed"):
        sample(model, tokenizer, prompts, out=out, shard=(1, 2), seed=1)
    with pytest.raises(spd.InputError, match="another deterministic"):
        sample(model, tokenizer, prompts, out=out, shard=(1, 2), deterministic=True)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (0.0, 2), "0/2", (0,)])
def test_bad_shards_are_refused(shard, model, tokenizer, prompts):
    with pytest.raises(spd.InputError, match=r"shard: expected \(i, n\)"):
        sample(model, tokenizer, prompts, shard=shard)


TOGETHER = """
import json, sys
from spd import distributed, generate, load_model, InputError

checkpoint, prompts, settings, calls = json.loads(sys.argv[1])
model, tokenizer = load_model(checkpoint)
for out in calls:
    found = generate(model, tokenizer, prompts, out=out, progress=False, **settings)
    assert [each.index for each in found] == list(range(len(prompts))), found
everyone = distributed.gather(found)
assert all(each == found for each in everyone)
try:
    generate(model, tokenizer, prompts, seed=distributed.rank(), progress=False)
except InputError as error:
    assert "the same in all 2 processes" in str(error)
else:
    raise AssertionError("other seeds were taken")
distributed.leave()
"""


def test_processes_of_torchrun_share_the_prompts(checkpoint, prompts, tmp_path):
    """Once without a file, once with one, and once more with the finished one; all get everything."""
    model, tokenizer = spd.load_model(checkpoint)
    settings = {"max_new_tokens": 5, "batch_size": 3}
    out = tmp_path / "g.jsonl"
    port = free_port()
    argument = json.dumps([str(checkpoint), prompts, settings, [None, str(out), str(out)]])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, argument],
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in started:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said.decode()[-3000:]
    assert read_generations(out) == spd.generate(model, tokenizer, prompts, progress=False, **settings)
    assert names(tmp_path) == ["g.jsonl", "g.settings.json"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
