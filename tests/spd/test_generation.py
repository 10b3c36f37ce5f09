"""Sampling: one stream of random numbers for each prompt, whatever the batch; files that survive a kill."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import spd
from spd.generation import read_generations
from spd.sampling import Sampling


def sample(model, tokenizer, prompts, **changes):
    return spd.generate(model, tokenizer, prompts, **({"max_new_tokens": 10, "progress": False} | changes))


def test_completions_do_not_depend_on_the_batch(model, tokenizer, prompts):
    alone = sample(model, tokenizer, prompts, batch_size=1)
    assert sample(model, tokenizer, prompts, batch_size=7) == alone
    assert sample(model, tokenizer, prompts, batch_size=64) == alone
    assert [generation.prompt for generation in alone] == prompts
    assert len({generation.completion for generation in alone}) > len(alone) // 2


def test_the_seed_matters_and_nothing_else_does(model, tokenizer, prompts):
    first = sample(model, tokenizer, prompts)
    torch.manual_seed(1234)
    assert sample(model, tokenizer, prompts) == first
    assert sample(model, tokenizer, prompts, seed=43) != first


def test_greedy_decoding_is_that_of_transformers(model, tokenizer, prompts):
    found = sample(model, tokenizer, prompts[:4], temperature=0.0, batch_size=2)
    for generation in found:
        tokens = tokenizer(generation.prompt, return_tensors="pt")
        expected = model.generate(**tokens, max_new_tokens=10, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        assert generation.completion == tokenizer.decode(expected, skip_special_tokens=True)


def sampling(**changes):
    return Sampling(**({"temperature": 1.0, "top_k": None, "top_p": 1.0, "max_new_tokens": 1, "seed": 0} | changes))


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 5)
    n = 20000
    uniforms = torch.rand(n, dtype=torch.float64)
    chosen = sampling().choose(scores.expand(n, 5), uniforms)
    shares = torch.bincount(chosen, minlength=5) / n
    expected = scores[0].softmax(-1)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_an_impossible_token_is_never_sampled():
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, 5)
    uniforms = torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sampling().choose(scores, uniforms).tolist() == [1, 3, 3]


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.9}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_token_is_chosen_where_the_largest_logit_is_not_finite(bad, changes):
    scores = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    scores[1, 7] = bad
    scores[2] = float("-inf")
    scores[3, 1:] = float("-inf")  # all suppressed but one
    found = sampling(**changes).choose(scores, torch.tensor([0.3] * 4, dtype=torch.float64)).tolist()
    assert found[0] >= 0 and found[1:] == [-1, -1, 0]


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])  # a nucleus of most tokens, of hundreds, of a few
@pytest.mark.parametrize("vocabulary", [40, 4000])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (7, 0.9), (7, 1.0), (None, 0.3)])
def test_what_may_be_sampled_is_what_transformers_leaves(vocabulary, spread, top_k, top_p):
    torch.manual_seed(0)
    scores = spread * torch.randn(16, vocabulary)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    cumulative = warpers(None, scores).double().softmax(-1).cumsum(-1)
    uniforms = torch.rand(16, dtype=torch.float64)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(sampling(temperature=0.7, top_k=top_k, top_p=top_p).choose(scores, uniforms), expected)


def test_a_small_nucleus_is_greedy(model, tokenizer, prompts):
    greedy = sample(model, tokenizer, prompts, temperature=0.0)
    assert sample(model, tokenizer, prompts, top_p=1e-6) == greedy
    assert sample(model, tokenizer, prompts, top_p=1.0, temperature=1e-4) == greedy


def test_only_the_likeliest_tokens_are_sampled(model, tokenizer, prompts):
    greedy = sample(model, tokenizer, prompts, temperature=0.0)
    assert sample(model, tokenizer, prompts, temperature=50.0, top_k=1, top_p=1.0) == greedy
    few = sample(model, tokenizer, prompts, temperature=50.0, top_k=2, top_p=1.0)
    assert few != greedy
    for generation in few[:4]:
        tokens = torch.tensor([list(tokenizer(generation.prompt)["input_ids"]) + generation.tokens])
        with torch.no_grad():
            best = model(tokens).logits[0].topk(2).indices
        start = tokens.shape[1] - len(generation.tokens)
        assert all(tokens[0, t] in best[t - 1] for t in range(start, tokens.shape[1]))


def test_sampling_settings_of_the_checkpoint_are_not_used(model, tokenizer, prompts):
    before = sample(model, tokenizer, prompts)
    model.generation_config = GenerationConfig(
        eos_token_id=0, pad_token_id=0, repetition_penalty=5.0, top_k=1, temperature=0.1, do_sample=True
    )
    own = model.generation_config
    assert sample(model, tokenizer, prompts) == before
    assert model.generation_config is own


def test_finished_means_the_model_ended_itself(model, tokenizer, prompts):
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.5
    found = sample(model, tokenizer, prompts, max_new_tokens=20, temperature=1.0, top_p=1.0)
    ended = [generation for generation in found if generation.finished]
    cut = [generation for generation in found if not generation.finished]
    assert ended and cut
    assert all(len(generation.tokens) == 20 for generation in cut)
    assert any(len(generation.tokens) < 20 for generation in ended)
    assert all(generation.tokens[-1] == tokenizer.eos_token_id for generation in ended)
    assert not any("<eos>" in generation.completion for generation in found)


def test_a_tokenizer_that_drops_a_leading_space_loses_nothing(make_model):
    """As SentencePiece does when it decodes a completion by itself."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁Answer:": 1, "▁there": 2, "▁are": 3}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    assert tokenizer.decode([2, 3]) == "there are"
    model = make_model("llama", vocab_size=4)
    with torch.no_grad():
        model.lm_head.weight[:2] = -model.lm_head.weight[2:]
    for generation in sample(model, tokenizer, ["Answer:"] * 3, max_new_tokens=4):
        whole = tokenizer.decode([1, *generation.tokens], skip_special_tokens=True)
        assert generation.prompt + generation.completion == whole


def test_a_file_of_other_weights_is_refused(model, tokenizer, prompts, tmp_path):
    out = tmp_path / "g.jsonl"
    sample(model, tokenizer, prompts[:3], out=out)
    with pytest.raises(spd.InputError, match="another weights"):
        sample(model.to(torch.bfloat16), tokenizer, prompts[:3], out=out)


def test_a_torn_file_is_completed_to_the_same_completions(model, tokenizer, prompts, tmp_path):
    whole = tmp_path / "whole.jsonl"
    expected = sample(model, tokenizer, prompts, out=whole, batch_size=4)
    lines = whole.read_bytes().splitlines(keepends=True)
    torn = tmp_path / "torn.jsonl"
    (tmp_path / "torn.settings.json").write_bytes((tmp_path / "whole.settings.json").read_bytes())
    for keep in (0, 1, 6, len(lines) - 1):
        torn.write_bytes(b"".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])
        with pytest.raises(spd.InputError):
            read_generations(torn)
        assert sample(model, tokenizer, prompts, out=torn, batch_size=4) == expected
        assert sorted(torn.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert read_generations(whole) == expected


def test_a_finished_file_is_not_generated_again(model, tokenizer, prompts, tmp_path, monkeypatch):
    out = tmp_path / "g.jsonl"
    expected = sample(model, tokenizer, prompts, out=out)
    monkeypatch.setattr("spd.decoding.Decoder.__call__", None)
    assert sample(model, tokenizer, prompts, out=out) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"temperature": 0.5}, "temperature"),
        ({"tag": "other"}, "tag"),
        ({"top_p": 0.5}, "top_p"),
    ],
)
def test_a_file_of_other_settings_is_refused(changes, named, model, tokenizer, prompts, tmp_path):
    out = tmp_path / "g.jsonl"
    sample(model, tokenizer, prompts[:3], out=out)
    before = out.read_bytes()
    with pytest.raises(spd.InputError, match=f"another {named}"):
        sample(model, tokenizer, prompts[:3], out=out, **changes)
    assert out.read_bytes() == before


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])  # gpt2 holds Q, K and V in one matrix
@pytest.mark.parametrize("mode", ["hook", "latent", "fold"])
def test_a_file_of_another_intervention_is_refused(family, mode, make_model, tokenizer, prompts, subspace_of, tmp_path):
    model = make_model(family)
    subspace, mode = subspace_of(model), "latent_v" if (family, mode) == ("gpt2", "latent") else mode
    sample(model, tokenizer, prompts[:3], out=tmp_path / "bare.jsonl")
    assert "intervention" not in json.loads((tmp_path / "bare.settings.json").read_text())
    subspace.save_pretrained(tmp_path / "saved")
    out = tmp_path / "g.jsonl"
    with spd.attach(model, subspace, mode=mode):
        expected = sample(model, tokenizer, prompts[:3], out=out)
        if mode == "hook":
            assert sample(copy.deepcopy(model), tokenizer, prompts[:3], out=out) == expected
    settings = json.loads(out.with_suffix(".settings.json").read_text())
    assert settings["intervention"] == {"subspace": subspace.sha256, "sides": "kv", "a": 0.0, "b": 1.0}
    with spd.attach(model, spd.Subspace.from_pretrained(tmp_path / "saved"), mode=mode):
        assert sample(model, tokenizer, prompts[:3], out=out) == expected
    changes = [{"subspace": subspace.truncate(2)}] + ([] if mode.startswith("latent") else [{"sides": "k"}, {"a": 0.5}])
    for change in changes:
        with (
            spd.attach(model, **({"subspace": subspace, "mode": mode} | change)),
            pytest.raises(spd.InputError, match="another intervention"),
        ):
            sample(model, tokenizer, prompts[:3], out=out)
    with pytest.raises(spd.InputError, match="another intervention"):
        sample(model, tokenizer, prompts[:3], out=out)


def test_a_file_that_is_not_ours_is_refused(model, tokenizer, prompts, tmp_path):
    out = tmp_path / "notes.jsonl"
    out.write_text("my notes\n")
    with pytest.raises(spd.InputError, match="not written by generate"):
        sample(model, tokenizer, prompts[:3], out=out)
    assert out.read_text() == "my notes\n"


@pytest.mark.parametrize("line", ["nonsense", '{"index": 0}', json.dumps([1])])
def test_a_broken_line_is_named(line, model, tokenizer, prompts, tmp_path):
    out = tmp_path / "g.jsonl"
    sample(model, tokenizer, prompts[:3], out=out)
    out.write_text(out.read_text() + line + "\n")
    with pytest.raises(spd.InputError, match="line 4"):
        sample(model, tokenizer, prompts[:3], out=out)


def test_awkward_text_survives_the_file(model, tokenizer, tmp_path):
    prompts = ["a\x00b", "line\u2028separator", "\u202eright to left", "tab\tand\r\nreturn", "\U0001f600"]
    found = sample(model, tokenizer, prompts, out=tmp_path / "g.jsonl")
    assert read_generations(tmp_path / "g.jsonl") == found


def test_prompts_the_model_has_no_room_for_are_named(model, tokenizer, prompts):
    with pytest.raises(spd.InputError, match=r"1 of 2 leave no room .* 512 positions: \[1\]"):
        sample(model, tokenizer, [prompts[0], "z" * 510])
    with pytest.raises(spd.InputError, match=r"no token at all: \[1\]"):
        sample(model, tokenizer, [prompts[0], ""])
    with pytest.raises(spd.InputError, match="int at index 0"):
        sample(model, tokenizer, [5])


def test_no_prompts_no_completions(model, tokenizer):
    assert sample(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_refused(changes, message, model, tokenizer, prompts):
    with pytest.raises(spd.InputError, match=message):
        sample(model, tokenizer, prompts, **changes)
