"""What arms share is made once; rounds start where the one before ended; the model is left as it was."""

import json

import pytest
import torch

import spd
from spd.arms import ARMS, Projection, parse_arm
from spd.config import parse_config
from spd.distillation import adapted, merged
from spd.files import sha256_of_file
from spd.generation import read_generations
from spd.stages import Stages


@pytest.fixture
def stages(checkpoint, made_records, tmp_path):
    return make(checkpoint, made_records, tmp_path / "run")


def make(checkpoint, made_records, folder, **changes):
    config = parse_config(
        {
            "model": str(checkpoint),
            "data": str(made_records),
            "tasks": ["gsm8k", "svamp"],
            "calibration": {"examples": 8, "rank": 4},
            "generation": {"prompts": 6, "max_new_tokens": 8, "batch_size": 6},
            "training": {"epochs": 2, "learning_rate": 1e-2},
            "evaluation": {"max_new_tokens": 6},
        }
        | changes
    )
    model, tokenizer = spd.load_model(checkpoint)
    return Stages(config, folder, model, tokenizer, progress=False)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_arms_that_write_the_same_share_it(stages):
    said = []
    stages.say = said.append
    for arm in ("spd", "spd:sides=k", "spd:rank=2", "spd:rank=full", "self-training"):
        stages.evaluate("gsm8k", parse_arm(arm), ["gsm8k"])
    made = [line for line in said if line.startswith("calibrate")]
    assert made == ["calibrate: gsm8k", "calibrate: gsm8k, rank=full", "calibrate: gsm8k, rank=2"]
    folder = stages.folder / "gsm8k"
    assert sorted(path.name for path in (folder / "generations").glob("*[!s].jsonl")) == [
        *("plain.jsonl", "projected.jsonl", "rank=2.jsonl", "rank=full.jsonl", "sides=k.jsonl"),
    ]


def test_a_rank_is_cut_from_one_calibration_at_full_rank(stages):
    cut = stages.subspace("gsm8k", parse_arm("spd:rank=4").projection)
    own = stages.subspace("gsm8k", Projection())
    for side in "kv":
        for layer in own.layers:
            assert torch.equal(cut.side(side)[layer].basis, own.side(side)[layer].basis)
    full = stages.subspace("gsm8k", parse_arm("spd:rank=full").projection)
    assert all(basis.rank == basis.width for basis in full.k.values())


@pytest.mark.parametrize("kind", ["random", "activations", "bottom", "shuffled"])
def test_controls_are_attached_and_tested(stages, kind):
    (score,) = stages.evaluate("gsm8k", parse_arm(f"projected:subspace={kind}"), ["gsm8k"])
    assert score.evaluation.n == 6
    control = stages.subspace("gsm8k", Projection(subspace=kind))
    own = stages.subspace("gsm8k", Projection())
    assert [basis.rank for basis in control.k.values()] == [basis.rank for basis in own.k.values()]
    assert not any(torch.equal(control.k[layer].basis, own.k[layer].basis) for layer in own.layers)


def test_another_tasks_subspace_is_that_tasks_own(stages):
    borrowed = stages.subspace_folder("gsm8k", parse_arm("spd:from=svamp").projection)
    assert borrowed == stages.subspace_folder("svamp", Projection())


def test_rounds_start_where_the_one_before_ended(stages):
    before = weights(stages.model)
    stages.evaluate("gsm8k", parse_arm("spd:rounds=3"), ["gsm8k"])
    assert equal(weights(stages.model), before), "the original is put back bit for bit"
    written = stages.folder / "gsm8k" / "generations"
    first, second, third = (read_generations(written / f"projected{end}.jsonl") for end in ("", ".round-2", ".round-3"))
    assert [g.prompt for g in first] == [g.prompt for g in third]
    assert len({tuple(tuple(g.tokens) for g in each) for each in (first, second, third)}) == 3
    subspaces = sorted(path.name for path in (stages.folder / "gsm8k" / "subspaces").iterdir())
    assert subspaces == ["gradient.after-projected", "gradient.after-projected.round-2"]


def test_a_second_round_is_not_shared_by_arms_that_differ_in_the_first(stages):
    for arm in ("spd:rounds=2", "spd:rounds=2,lr=0.003", "spd:rounds=2,sides=v"):
        stages.evaluate("gsm8k", parse_arm(arm), ["gsm8k"])
    adapters = stages.folder / "gsm8k" / "adapters"
    hashes = {path.name: sha256_of_file(path / "adapter_model.safetensors") for path in adapters.iterdir()}
    assert sorted(hashes) == [
        *("projected", "projected,lr=0.003", "projected,lr=0.003.round-2", "projected.round-2"),
        *("sides=v", "sides=v.round-2"),
    ]
    assert len(set(hashes.values())) == 6


def test_merging_is_the_adapted_model_and_leaves_no_trace(stages):
    adapter = stages.adapter("gsm8k", ARMS["self-training"], 1)
    model, tokens = stages.model, torch.arange(5, 25)[None]
    before = weights(model)
    with adapted(model, adapter) as tuned, torch.no_grad():
        expected = tuned(tokens).logits
    with merged(model, adapter) as same, torch.no_grad():
        assert same is model
        assert torch.allclose(model(tokens).logits, expected, atol=1e-4)
        assert not equal(weights(model), before)
    assert equal(weights(model), before)
    with pytest.raises(KeyboardInterrupt), merged(model, adapter):
        raise KeyboardInterrupt
    assert equal(weights(model), before)


def test_ssd_samples_its_own_way(stages):
    stages.adapter("gsm8k", ARMS["ssd"], 1)
    settings = json.loads((stages.folder / "gsm8k" / "generations" / "ssd.settings.json").read_text())
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (1.6, 20, 0.8)


def test_training_prompts_without_room_are_counted_named_and_left_out(checkpoint, made_records, tmp_path):
    stages = make(checkpoint, made_records, tmp_path / "long", generation={"max_new_tokens": 500})
    with pytest.raises(spd.InputError, match="none of the 24 training prompts of gsm8k"):
        stages.training_prompts("gsm8k")
    room = 512 - min(len(stages.tokenizer(p)["input_ids"]) for p in stages.task("gsm8k").training_prompts())
    stages = make(checkpoint, made_records, tmp_path / "some", generation={"max_new_tokens": room})
    with pytest.warns(UserWarning, match=r"of 24 training prompts of gsm8k are too long .*: \["):
        kept = stages.training_prompts("gsm8k")
    recorded = json.loads((tmp_path / "some" / "gsm8k" / "prompts.json").read_text())
    assert recorded["prompts"] == 24
    assert len(recorded["too_long"]) == 24 - len(kept) > 0


def test_questions_that_were_training_prompts_are_counted(stages, made_records, monkeypatch):
    task = stages.task("gsm8k")
    leaked = [spd.Question(prompt, "#### 1") for prompt in task.training_prompts()[:2]]
    monkeypatch.setattr(type(task), "test", lambda self: leaked)
    with pytest.warns(UserWarning, match="2 of the 2 questions of gsm8k are training prompts of gsm8k"):
        stages.evaluate("gsm8k", ARMS["self-training"], ["gsm8k"])


def test_tasks_of_one_name_are_refused(checkpoint, made_records, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "mine").mkdir(parents=True)
        record = {"prompt": f"{name}?", "completion": " 1", "spans": [[2, 4]]}
        (tmp_path / name / "mine" / "train.jsonl").write_text(json.dumps(record) + "\n")
    stages = make(checkpoint, made_records, tmp_path / "run")
    assert stages.task(str(tmp_path / "a" / "mine")).name == "mine"
    with pytest.raises(spd.InputError, match="is called mine, and so is another task"):
        stages.task(str(tmp_path / "b" / "mine"))


def test_rounds_in_half_precision_are_refused(stages):
    adapter = stages.adapter("gsm8k", ARMS["self-training"], 1)
    expected = pytest.raises(spd.InputError, match="bfloat16, in which an adapter's small updates vanish")
    with expected, merged(stages.model.bfloat16(), adapter):
        pass


def test_every_round_draws_anew_and_the_first_as_ever(stages):
    from spd.stages import _seed

    assert _seed(42, 1) == 42
    assert len({_seed(seed, round) for seed in (42, 43) for round in (1, 2, 3)}) == 6


def test_a_subspace_from_elsewhere_stays_in_the_folder(stages, tmp_path):
    own = tmp_path / "own" / "sums"
    own.mkdir(parents=True)
    record = {"prompt": "1 + 1 =", "completion": " 2", "spans": ["2"]}
    (own / "train.jsonl").write_text("".join(json.dumps(record | {"prompt": f"{n} + 1 ="}) + "\n" for n in range(9)))
    folder = stages.subspace_folder("gsm8k", parse_arm(f"spd:from={own}").projection)
    assert folder == stages.folder / "sums" / "subspace"
