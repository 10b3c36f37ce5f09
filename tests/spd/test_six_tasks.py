"""Each of the six data sets goes through calibration, generation, training and evaluation, offline, on two models."""

import warnings

import pytest

import spd
from spd.tasks import DATA_SETS

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def models(make_model, tokenizer):
    """The carried model, and a random-weight model of Qwen2's shape with room for long prompts."""
    return {
        "proving-ground": spd.load_model("proving-ground"),
        "qwen2": (make_model("qwen2", max_position_embeddings=4096), tokenizer),
    }


@pytest.mark.parametrize("model_name", ["proving-ground", "qwen2"])
@pytest.mark.parametrize("name", list(DATA_SETS))
def test_the_method_on_real_records(name, model_name, models, records, tmp_path):
    model, tokenizer = models[model_name]
    task = spd.load_task(name, records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a small tokenizer makes long texts, whose spans are cut
        subspace = spd.calibrate(
            model, tokenizer, task.calibration()[:6], rank=4, max_length=512, batch_size=2, progress=False
        )
        assert subspace.provenance["examples"] >= 1
        room = [prompt for prompt in task.training_prompts()[:40] if len(tokenizer(prompt)["input_ids"]) < 500][:3]
        with spd.attach(model, subspace):
            written = spd.generate(model, tokenizer, room, max_new_tokens=NEW_TOKENS, progress=False)
        assert [generation.prompt for generation in written] == room
        adapter = spd.distill(
            model, tokenizer, written, out=tmp_path / "adapter", recipe=spd.Recipe(epochs=1), progress=False
        )
        with spd.adapted(model, adapter) as tuned:
            found = spd.evaluate(
                tuned,
                tokenizer,
                task,
                limit=5,
                max_new_tokens=NEW_TOKENS,
                run_generated_code=True,
                progress=False,
            )
    assert len(found.answers) + len(found.too_long) == 5
    assert len(found.answers) >= 1
    assert found.metric == task.metric
    if task.metric == "nll":
        assert len(found.nlls) == len(found.answers)
        assert 0 < found.value_interval[0] <= found.value <= found.value_interval[1]
    else:
        assert 0 <= found.correct <= found.n == len(found.answers)


def test_code_is_run_only_with_consent(models, records):
    with pytest.raises(spd.InputError, match=r"mbpp is judged by running the code.*--run-generated-code"):
        spd.evaluate(*models["qwen2"], spd.load_task("mbpp", records), limit=1)


def test_questions_without_room_are_left_out_counted_and_named(models, records):
    model, tokenizer = models["proving-ground"]
    task = spd.load_task("mmlu", records)
    with pytest.warns(UserWarning, match=r"evaluate: \d+ of 60 questions of mmlu are too long .* left out: \d+"):
        found = spd.evaluate(model, tokenizer, task, limit=60, max_new_tokens=4, progress=False)
    assert found.too_long
    assert found.n == 60 - len(found.too_long)
    assert found.to_dict()["too_long"] == list(found.too_long)
    questions = task.test()[:60]
    assert all(len(tokenizer(questions[i].prompt)["input_ids"]) + 4 > 512 for i in found.too_long)
    with pytest.raises(spd.InputError, match="none of the 3 questions of mmlu fits"):
        spd.evaluate(model, tokenizer, task, limit=3, max_new_tokens=512, progress=False)
