"""Generation with vLLM: what it is asked, and what is written; with vLLM itself where it is installed."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import spd
from spd.engine import generate_with_vllm, request_seed
from spd.generation import read_generations

END = 0


def answer(tokens):
    """Two tokens, and for half of the prompts the one that ends a text."""
    n = len(tokens)
    return [n, n + 1, END] if sum(tokens) % 2 else [n, n + 1]


@pytest.fixture
def vllm(monkeypatch):
    """A module of that name that keeps what it is asked."""
    asked = SimpleNamespace(engines=[], requests=[], projected=[], fail_after=None)

    class LLM:
        def __init__(self, model, **options):
            asked.engines.append((model, options))
            weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
            asked.projected.append(weights["model.layers.3.self_attn.v_proj.weight"])

        def generate(self, prompts, sampling, use_tqdm):
            if asked.fail_after is not None and len(asked.requests) >= asked.fail_after:
                raise RuntimeError("out of memory, on purpose")
            asked.requests += zip(prompts, sampling, strict=True)
            sampled = [answer(prompt["prompt_token_ids"]) for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))]) for tokens in sampled]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", module)
    return asked


def test_what_vllm_is_asked(vllm, checkpoint, prompts):
    _, tokenizer = spd.load_model(checkpoint)
    made = generate_with_vllm(
        checkpoint,
        prompts,
        temperature=0.5,
        top_p=0.8,
        max_new_tokens=7,
        seed=3,
        progress=False,
        options={"tensor_parallel_size": 2},
    )
    assert vllm.engines == [(str(checkpoint), {"seed": 3, "generation_config": "vllm", "tensor_parallel_size": 2})]
    encoded = tokenizer(prompts)["input_ids"]
    assert [prompt["prompt_token_ids"] for prompt, _ in vllm.requests] == encoded
    common = {"temperature": 0.5, "top_k": -1, "top_p": 0.8, "max_tokens": 7, "stop_token_ids": [END]}
    for index, (_, sampling) in enumerate(vllm.requests):
        assert sampling == common | {"ignore_eos": True, "detokenize": False, "seed": request_seed(3, index)}
    assert len({sampling["seed"] for _, sampling in vllm.requests}) == len(prompts)

    for index, (prompt, tokens, each) in enumerate(zip(prompts, encoded, made, strict=True)):
        assert each.tokens == answer(tokens)
        assert (each.index, each.prompt, each.finished) == (index, prompt, END in each.tokens)
        assert prompt + each.completion == tokenizer.decode(tokens + each.tokens[:2])
    assert {each.finished for each in made} == {True, False}


def test_what_is_written_resumes_and_trains(vllm, checkpoint, prompts, tokenizer, tmp_path):
    out = tmp_path / "completions.jsonl"
    vllm.fail_after = 8
    with pytest.raises(RuntimeError, match="on purpose"):
        generate_with_vllm(checkpoint, prompts, out=out, at_once=4, progress=False)
    assert len(out.read_text().splitlines()) == 8
    vllm.fail_after = None
    made = generate_with_vllm(checkpoint, prompts, out=out, at_once=4, progress=False)
    assert len(vllm.requests) == len(prompts)
    assert read_generations(out) == made
    assert generate_with_vllm(checkpoint, prompts, out=out, progress=False) == made
    assert len(vllm.engines) == 2, "a finished file starts no engine"
    with pytest.raises(spd.InputError, match="another seed"):
        generate_with_vllm(checkpoint, prompts, out=out, seed=1, progress=False)
    model, _ = spd.load_model(checkpoint)
    with pytest.raises(spd.InputError, match="made with another"):
        spd.generate(model, tokenizer, prompts, out=out, progress=False)
    assert json.loads((tmp_path / "completions.settings.json").read_text())["engine"] == "vllm"


def test_a_subspace_is_folded_for_the_time_it_takes(vllm, checkpoint, prompts, subspace_of, tmp_path):
    model, _ = spd.load_model(checkpoint)
    subspace = subspace_of(model)
    subspace.save_pretrained(tmp_path / "subspace")
    out = tmp_path / "run" / "completions.jsonl"
    killed = out.parent / ".completions.jsonl.abcdefgh.tmp" / "checkpoint"
    killed.mkdir(parents=True)
    generate_with_vllm(checkpoint, prompts, subspace=tmp_path / "subspace", out=out, progress=False)
    folder = Path(vllm.engines[0][0])
    assert folder.parent.parent == out.parent
    assert re.fullmatch(r"\.completions\.jsonl\.[a-z0-9_]{8}\.tmp", folder.parent.name), "found again after a kill"
    u = subspace.v[3].basis
    plain = model.state_dict()["model.layers.3.self_attn.v_proj.weight"]
    torch.testing.assert_close(vllm.projected[0], u @ (u.T @ plain), rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in out.parent.iterdir()) == ["completions.jsonl", "completions.settings.json"]
    with pytest.raises(spd.InputError, match="another subspace"):
        generate_with_vllm(checkpoint, prompts, out=out, progress=False)


def test_without_vllm(monkeypatch, checkpoint, prompts):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(spd.InputError, match=r"vllm is not installed.*spd\[vllm\]"):
        generate_with_vllm(checkpoint, prompts, progress=False)


def test_bad_input_is_refused_before_the_engine_starts(vllm, checkpoint):
    for prompts, settings, match in (
        ([""], {}, "no token at all"),
        (["word " * 600], {}, "leave no room"),
        (["a"], {"temperature": -1}, "temperature"),
        (["a"], {"at_once": 0}, "at_once"),
    ):
        with pytest.raises(spd.InputError, match=match):
            generate_with_vllm(checkpoint, prompts, progress=False, **settings)
    assert not vllm.engines


def test_vllm_itself_gives_the_greedy_completions(checkpoint, prompts, subspace_of, tmp_path):
    pytest.importorskip("vllm", reason="vllm is not installed (the extra vllm)")
    model, tokenizer = spd.load_model(checkpoint)
    subspace = subspace_of(model)
    with spd.attach(model, subspace):
        expected = spd.generate(model, tokenizer, prompts[:4], temperature=0, max_new_tokens=8, progress=False)
    found = generate_with_vllm(
        checkpoint,
        prompts[:4],
        subspace=subspace,
        temperature=0,
        max_new_tokens=8,
        progress=False,
        options={"dtype": "float32", "enforce_eager": True, "max_model_len": 256},
    )
    assert [each.tokens for each in found] == [each.tokens for each in expected]
