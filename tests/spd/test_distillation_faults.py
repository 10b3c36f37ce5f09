"""Training on the worst day: killed, on a full disk, with files damaged, twice at once, in too little memory."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

import spd
from spd.lock import locked
from spd.training import checkpoints, trainer
from spd.training.loss import SummedLoss

RECIPE = spd.Recipe(epochs=6, batch_size=4, learning_rate=2e-2, lora_dropout=0.1)


@pytest.fixture(scope="module")
def generations(prompts):
    return [
        spd.Generation(index, prompt, f" the answer is {index}", [], finished=index % 3 > 0)
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_STEPS", 7)


@pytest.fixture(scope="module")
def undisturbed(make_model, tokenizer, generations, tmp_path_factory):
    return train(make_model("qwen3"), tokenizer, generations, tmp_path_factory.mktemp("undisturbed") / "adapter")


def train(model, tokenizer, generations, out, recipe=RECIPE, **more):
    return spd.distill(model, tokenizer, generations, out=out, recipe=recipe, progress=False, **more)


def pull(monkeypatch, step, how):
    """Stop the training after this step."""
    on_step_end = trainer._Progress.on_step_end

    def pulled(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            how()

    monkeypatch.setattr(trainer._Progress, "on_step_end", pulled)


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(model, tokenizer, generations, tmp_path, monkeypatch):
    """The folder of a training that was interrupted at step 16, with whole checkpoints of steps 7 and 14."""
    with monkeypatch.context() as patch:
        pull(patch, 16, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(model, tokenizer, generations, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert not hasattr(model, "peft_config")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.checkpoints"]
    return tmp_path / "adapter"


def assert_same(one, other):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [json.loads((folder / "training.json").read_text())["loss"] for folder in (one, other)]
    assert losses[0] == losses[1]
    assert not one.with_name(one.name + ".checkpoints").exists()


def resumed_from(monkeypatch):
    found = []
    last_whole = checkpoints.last_whole
    monkeypatch.setattr("spd.distillation.last_whole", lambda work: found.append(last_whole(work)) or found[-1])
    return found


def test_an_interrupted_training_ends_as_an_undisturbed_one(
    model, tokenizer, generations, interrupted, undisturbed, monkeypatch
):
    work = interrupted.with_name("adapter.checkpoints")
    (work / "checkpoint-999").mkdir()  # as if torn while it was written
    with pytest.raises(spd.InputError, match=r"adapter\.checkpoints: is of a training with another recipe"):
        train(model, tokenizer, generations, interrupted, spd.Recipe())
    found = resumed_from(monkeypatch)
    assert_same(train(model, tokenizer, generations, interrupted), undisturbed)
    assert found == [work / "checkpoint-14"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("damage", [flip, cut, os.unlink])
def test_a_damaged_checkpoint_is_not_taken(
    damage, model, tokenizer, generations, interrupted, undisturbed, monkeypatch
):
    """The newest is damaged in each of its files in turn, then the one before it too."""
    work = interrupted.with_name("adapter.checkpoints")
    spare = work.with_name("spare")
    shutil.copytree(work / "checkpoint-14", spare)
    names = sorted(path.name for path in spare.iterdir())
    assert {*FILES, "trainer_state.json", "complete"} <= {*names}
    for name in names:
        shutil.copytree(spare, work / "checkpoint-14", dirs_exist_ok=True)
        damage(work / "checkpoint-14" / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert checkpoints.last_whole(work) == work / "checkpoint-7", name
        assert not (work / "checkpoint-14").exists()
    damage(work / "checkpoint-7" / "optimizer.pt")
    found = resumed_from(monkeypatch)
    with pytest.warns(UserWarning, match="checkpoint-7 is damaged and removed"):
        train(model, tokenizer, generations, interrupted)
    assert found == [None]
    assert_same(interrupted, undisturbed)


def test_a_file_that_was_not_sealed_is_no_part_of_a_checkpoint(interrupted):
    work = interrupted.with_name("adapter.checkpoints")
    (work / "checkpoint-14" / "scaler.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.warns(UserWarning, match="checkpoint-14 is damaged"):
        assert checkpoints.last_whole(work) == work / "checkpoint-7"


def test_a_damaged_key_is_refused(model, tokenizer, generations, interrupted):
    cut(interrupted.with_name("adapter.checkpoints") / "key.json")
    with pytest.raises(spd.InputError, match=r"key\.json: not a JSON file"):
        train(model, tokenizer, generations, interrupted)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_training_ends_as_an_undisturbed_one(
    how, model, tokenizer, generations, undisturbed, tmp_path, monkeypatch
):
    def victim():
        pull(pytest.MonkeyPatch(), 10, lambda: os.kill(os.getpid(), how))
        train(model, tokenizer, generations, tmp_path / "adapter")

    process = multiprocessing.get_context("fork").Process(target=victim)
    process.start()
    process.join(60)
    assert process.exitcode == -how
    found = resumed_from(monkeypatch)
    assert_same(train(model, tokenizer, generations, tmp_path / "adapter"), undisturbed)
    assert found == [tmp_path / "adapter.checkpoints" / "checkpoint-7"]


@pytest.mark.parametrize("words", ["torch", "safetensors", "kernel"])
def test_a_full_disk_is_one_line_and_what_was_whole_remains(
    words, model, tokenizer, generations, undisturbed, tmp_path, monkeypatch
):
    """Whoever writes when the disk is full says so in its own way."""
    from safetensors import SafetensorError

    error = {
        "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore"),
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "kernel": OSError(errno.ENOSPC, "No space left on device"),
    }[words]
    save = trainer.Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 14:
            raise error
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(OSError, match=r"checkpoint-14: the checkpoint could not be written \(") as raised:
            train(model, tokenizer, generations, tmp_path / "adapter")
    assert "\n" not in str(raised.value)
    work = tmp_path / "adapter.checkpoints"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-7", "key.json"]
    assert_same(train(model, tokenizer, generations, tmp_path / "adapter"), undisturbed)


def test_a_loss_that_is_not_finite_ends_the_training(model, tokenizer, generations, tmp_path, monkeypatch):
    before, calls = SummedLoss.__call__, 0

    def call(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return before(self, *args, **kwargs) * (float("nan") if calls > 9 else 1.0)

    monkeypatch.setattr(SummedLoss, "__call__", call)
    with pytest.raises(
        spd.InputError, match="distill: step 10: expected a finite loss, got nan; lower the learning_rat"
    ):
        train(model, tokenizer, generations, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    work = tmp_path / "adapter.checkpoints"
    assert checkpoints.last_whole(work) == work / "checkpoint-7"


@pytest.mark.parametrize(("step", "last"), [(7, None), (14, "checkpoint-7"), (30, "checkpoint-28")])
def test_weights_that_are_not_finite_are_not_saved(step, last, model, tokenizer, generations, tmp_path, monkeypatch):
    class Poison(trainer._Progress):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control)
            if state.global_step == step:
                with torch.no_grad():
                    next(p for p in kwargs["model"].parameters() if p.requires_grad).view(-1)[3] = float("inf")

    monkeypatch.setattr(trainer, "_Progress", Poison)
    with pytest.raises(spd.InputError, match=f"distill: step {step}: expected finite trained weights"):
        train(model, tokenizer, generations, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    work = tmp_path / "adapter.checkpoints"
    assert checkpoints.last_whole(work) == (work / last if last else None)


def test_gradients_that_are_not_finite_are_left_to_the_scaling_of_the_loss(
    model, tokenizer, generations, tmp_path, monkeypatch
):
    """It skips such a step, after which the loss and the weights are finite."""
    skipped = []

    def infinite(self, *args, **kwargs):
        if self.state.global_step == 4:
            for parameter in self.trained:
                parameter.grad = None  # nothing to step with
            skipped.append(self.state.global_step)
        return torch.tensor(float("inf") if skipped else 1.0)

    monkeypatch.setattr(trainer._Trainer, "_get_grad_norm", infinite)
    out = train(model, tokenizer, generations, tmp_path / "adapter")
    assert skipped == [4] and (out / "training.json").is_file()


def test_two_trainings_do_not_share_a_folder(model, tokenizer, generations, tmp_path):
    held = multiprocessing.get_context("fork").Event()

    def holder():
        with locked(tmp_path / "adapter", "distill"):
            held.set()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=holder)
    process.start()
    try:
        assert held.wait(30)
        with pytest.raises(spd.InputError, match=r"distill: .*adapter is in use by another run"):
            train(model, tokenizer, generations, tmp_path / "adapter")
    finally:
        process.kill()
        process.join()
    train(model, tokenizer, generations[:4], tmp_path / "adapter", spd.Recipe(epochs=1))  # the lock died with it


def test_a_finished_adapter_is_kept_or_refused(model, tokenizer, generations, undisturbed, tmp_path, monkeypatch):
    out = shutil.copytree(undisturbed, tmp_path / "adapter")
    monkeypatch.setattr("spd.distillation._train", None)
    assert train(model, tokenizer, generations, out) == out
    (tmp_path / "adapter.checkpoints").mkdir()  # as a kill right after the adapter was finished leaves it
    (tmp_path / "adapter.checkpoints" / "key.json").write_text("{}")
    assert train(model, tokenizer, generations, out) == out
    assert not (tmp_path / "adapter.checkpoints").exists()
    with pytest.raises(spd.InputError, match="another data_sha256"):
        train(model, tokenizer, generations[1:], out)
    with pytest.raises(spd.InputError, match="another recipe"):
        train(model, tokenizer, generations, out, spd.Recipe())


@pytest.mark.parametrize("damage", [flip, cut, os.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "training.json"])
def test_a_damaged_adapter_is_refused(name, damage, model, tokenizer, generations, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "adapter")
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    damage(out / name)
    for use in (lambda: train(model, tokenizer, generations, out), lambda: spd.adapted(model, out).__enter__()):
        with pytest.raises(spd.InputError, match="adapter") as raised:
            use()
        assert "\n" not in str(raised.value)
    assert not hasattr(model, "peft_config")


def test_an_adapter_from_before_files_were_hashed_is_taken(model, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "adapter")
    manifest = json.loads((out / "training.json").read_text())
    for name in ("files_sha256", "manifest_sha256"):
        del manifest[name]
    (out / "training.json").write_text(json.dumps(manifest))
    with spd.adapted(model, out) as tuned:
        assert hasattr(tuned, "peft_config")


def test_a_batch_that_does_not_fit_is_halved_and_its_gradient_is_the_same(
    model, tokenizer, generations, tmp_path, monkeypatch
):
    recipe = spd.Recipe(epochs=2, batch_size=8, learning_rate=2e-3, lora_dropout=0.0)
    whole = train(model, tokenizer, generations, tmp_path / "whole", recipe)
    loss = SummedLoss.__call__

    def narrow(self, labels, **inputs):
        """Fails on the way back, with gradients already added to those of an earlier part."""
        found = loss(self, labels, **inputs)
        if len(labels) > 3 or labels.numel() > 240:
            found.backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    monkeypatch.setattr(SummedLoss, "__call__", narrow)
    with pytest.warns(UserWarning, match="distill: 8 texts at a time do not fit in memory; going on with 4"):
        halved = train(model, tokenizer, generations, tmp_path / "halved", recipe)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, halved))
    scale = max(float(tensor.abs().max()) for tensor in a.values())
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4 * scale


def test_where_bytes_are_promised_a_batch_is_not_halved(model, tokenizer, generations, tmp_path, monkeypatch):
    loss = SummedLoss.__call__

    def narrow(self, labels, **inputs):
        if len(labels) > 3:
            raise MemoryError("no memory")
        return loss(self, labels, **inputs)

    monkeypatch.setattr(SummedLoss, "__call__", narrow)
    with pytest.raises(spd.InputError, match="distill: deterministic: 4 texts at a time do not fit in memory"):
        train(model, tokenizer, generations, tmp_path / "adapter", deterministic=True)


def test_deterministic_bytes_do_not_depend_on_the_threads(make_model, tokenizer, generations, tmp_path):
    """Wide enough that sums are split over threads."""
    model = make_model("qwen3", hidden_size=256, intermediate_size=640)
    found, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            out = tmp_path / f"{count}" / "adapter"
            train(model, tokenizer, generations[:6], out, spd.Recipe(epochs=2), deterministic=True)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]
    with pytest.warns(UserWarning, match="distill: deterministic: .* float32 alone; the model is in bfloat16"):
        train(model.bfloat16(), tokenizer, generations[:2], tmp_path / "half", spd.Recipe(epochs=1), deterministic=True)


def test_a_folder_that_a_killed_training_left_goes(model, tokenizer, generations, tmp_path):
    left = tmp_path / ".adapter.abcd_123.tmp"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(bytes(100))
    other = tmp_path / ".adapter.v2.abcd_123.tmp"
    other.mkdir()
    train(model, tokenizer, generations[:4], tmp_path / "adapter", spd.Recipe(epochs=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "adapter"]


def test_not_even_one_text_fits(model, tokenizer, generations, tmp_path, monkeypatch):
    def none(self, labels, **inputs):
        raise MemoryError("no memory")

    monkeypatch.setattr(SummedLoss, "__call__", none)
    with pytest.warns(UserWarning), pytest.raises(spd.InputError, match="not even one of the texts fits in memory"):
        train(model, tokenizer, generations, tmp_path / "adapter")
