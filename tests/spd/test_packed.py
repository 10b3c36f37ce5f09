"""Packed linear layers: the same numbers to rounding, and the model as it was afterwards."""

import pytest
import torch
from torch import nn

import spd
from spd import packed as module
from spd.packed import packed

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.skipif(not AVAILABLE, reason="torch is built without oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 1), (4, 33)])
def test_the_same_to_rounding(bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=bias)
    small = nn.Linear(512, 8)
    x = torch.randn(*shape, 512)
    with torch.no_grad():
        expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with packed(nn.Sequential(layer, small)):
            assert "forward" in vars(layer)
            assert "forward" not in vars(small), "too small to gain"
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
            with packed(layer):
                layer(x)
            assert "forward" in vars(layer), "the inner block leaves it to the outer one"
    assert "forward" not in vars(layer)


def test_a_gradient_is_the_layers_own():
    layer = nn.Linear(512, 512)
    x = torch.randn(2, 512, requires_grad=True)
    with packed(layer):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))
    assert layer.weight.grad is not None


@pytest.mark.parametrize("kind", ["double", "bfloat16", "large"])
def test_what_is_left_alone(kind, monkeypatch):
    layer = nn.Linear(512, 512)
    if kind == "large":
        monkeypatch.setattr(module, "LARGEST", layer.weight.nbytes - 1)
    else:
        layer = getattr(layer, kind)()
    with packed(layer):
        assert "forward" not in vars(layer)


def test_it_is_undone_after_an_error():
    layer = nn.Linear(512, 512)
    with pytest.raises(KeyError), packed(layer):
        raise KeyError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("mode", [None, "hook", "fold", "latent_v", "latent"])
def test_completions_and_likelihoods_are_the_same(mode, make_model, tokenizer, examples, monkeypatch):
    """Under hooks, folded and as latents, with adapters' layers beside."""
    from contextlib import nullcontext

    from spd.likelihood import completion_nll

    monkeypatch.setattr(module, "SMALLEST", 1)
    model = make_model("qwen2")
    subspace = spd.calibrate(model, tokenizer, examples, progress=False)
    pairs = [(each.prompt, each.completion) for each in examples]
    prompts = [each.prompt for each in examples[:6]]
    with spd.attach(model, subspace, mode=mode) if mode else nullcontext():
        plain = completion_nll(model, tokenizer, pairs, progress=False)
        written = spd.generate(model, tokenizer, prompts, temperature=0.0, max_new_tokens=12, progress=False)
        with packed(model):
            again = completion_nll(model, tokenizer, pairs, progress=False)
            same = spd.generate(model, tokenizer, prompts, temperature=0.0, max_new_tokens=12, progress=False)
    assert [each.nll for each in again] == pytest.approx([each.nll for each in plain], rel=1e-4)
    assert same == written
