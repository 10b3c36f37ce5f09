"""The intervention: both forms agree with the formula, and the model comes back bit for bit."""

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn

import spd
from spd.sites import find_sites


def logits(model, tokenizer):
    tokens = tokenizer(["Question: how many apples are 5 and 6?\nAnswer: 11"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(tokens).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, -1.0), (0.5, 0.5)])
def test_fold_equals_hook_and_is_undone(family, a, b, make_model, tokenizer, subspace_of):
    model = make_model(family)
    subspace = subspace_of(model)
    base, before = logits(model, tokenizer), state(model)
    with spd.attach(model, subspace, mode="hook", a=a, b=b) as handle:
        assert handle.mode == "hook"
        hooked = logits(model, tokenizer)
    with spd.attach(model, subspace, mode="fold", a=a, b=b) as handle:
        assert handle.mode == "fold"
        folded = logits(model, tokenizer)
    torch.testing.assert_close(folded, hooked, rtol=0, atol=2e-5)
    assert float((hooked - base).abs().max()) > 1e-2, "the intervention does something"
    assert torch.equal(logits(model, tokenizer), base)
    assert same(model, before)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("sides", ["k", "v", "kv"])
@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_what_leaves_the_layer_is_the_projection(family, sides, mode, make_model, tokenizer, subspace_of):
    model = make_model(family)
    subspace = subspace_of(model)
    site = find_sites(model)[3]
    hidden = torch.randn(2, 5, 32)
    before = {side: site.side(side).read(site.side(side).module(hidden)) for side in "kv"}
    with spd.attach(model, subspace, mode=mode, sides=sides):
        after = {side: site.side(side).read(site.side(side).module(hidden)) for side in "kv"}
    for side in "kv":
        u = subspace.side(side)[3].basis
        expected = before[side] @ u @ u.T if side in sides else before[side]
        torch.testing.assert_close(after[side], expected, rtol=1e-5, atol=1e-5)


def test_auto_folds_where_it_can(model, subspace_of):
    with spd.attach(model, subspace_of(model)) as handle:
        assert handle.mode == "fold"


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_the_model_comes_back_when_the_block_raises(mode, model, tokenizer, subspace_of):
    subspace, base, before = subspace_of(model), logits(model, tokenizer), state(model)
    with pytest.raises(RuntimeError, match="on purpose"), spd.attach(model, subspace, mode=mode):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, tokenizer), base)
    assert same(model, before)


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_the_handle_works_without_a_block(mode, model, tokenizer, subspace_of):
    subspace, base = subspace_of(model), logits(model, tokenizer)
    handle = spd.attach(model, subspace, mode=mode)
    assert not torch.equal(logits(model, tokenizer), base)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, tokenizer), base)


def test_one_intervention_at_a_time(model, tokenizer, examples, prompts, subspace_of, tmp_path):
    subspace = subspace_of(model)
    with spd.attach(model, subspace, mode="hook"):
        with pytest.raises(spd.InputError, match="attach: the model carries an intervention already"):
            spd.attach(model, subspace)
        with pytest.raises(spd.InputError, match="calibrate: the model carries"):
            spd.calibrate(model, tokenizer, examples, progress=False)
        with pytest.raises(spd.InputError, match="distill: the model carries"):
            spd.distill(model, tokenizer, [spd.Generation(0, "a", "b", [], True)], out=tmp_path / "adapter")
    spd.attach(model, subspace).remove()


def test_a_shared_weight_is_hooked_not_folded(model, tokenizer, subspace_of):
    subspace = subspace_of(model)
    layers = model.model.layers
    layers[1].self_attn.k_proj.weight = layers[2].self_attn.k_proj.weight
    with spd.attach(model, subspace) as handle:
        assert handle.mode == "hook"
    with pytest.raises(spd.InputError, match=r'layers\.2\.self_attn\.k_proj shares its weight.*mode "hook" can'):
        spd.attach(model, subspace, mode="fold")


def test_a_layer_of_another_kind_is_hooked_not_folded(model, tokenizer, subspace_of):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    subspace, base = subspace_of(model), state(model)
    old = model.model.layers[3].self_attn.v_proj
    new = Scaled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[3].self_attn.v_proj = new
    with spd.attach(model, subspace) as handle:
        assert handle.mode == "hook"
    with pytest.raises(spd.InputError, match="Scaled"):
        spd.attach(model, subspace, mode="fold")
    assert same(model, base)


@pytest.mark.parametrize("mode", ["auto", "hook", "fold"])
@pytest.mark.parametrize(
    ("family", "name"), [("qwen3", "k_proj"), ("phi3", "qkv_proj"), ("gpt2", "c_attn"), ("gpt_neox", "query_key_value")]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_lora_adapter_on_a_projected_module_is_refused(family, name, mode, make_model, subspace_of):
    model = make_model(family)
    subspace = subspace_of(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=[name], task_type="CAUSAL_LM"))
    with pytest.raises(spd.InputError, match=rf"{name} carries an adapter.*merge or unload"):
        spd.attach(tuned, subspace, mode=mode)


def test_an_adapter_elsewhere_is_no_obstacle(model, subspace_of):
    subspace = subspace_of(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with spd.attach(tuned, subspace) as handle:
        assert handle.mode == "fold"


def test_a_subspace_of_other_layers_or_widths_is_refused(model):
    values = torch.ones(16, dtype=torch.float64)
    basis = spd.Basis(torch.eye(16)[:, :4], values)
    with pytest.raises(spd.InputError, match="layer 7"):
        spd.attach(model, spd.Subspace({7: basis}, {7: basis}))
    narrow = spd.Basis(torch.eye(8)[:, :4], values[:8])
    with pytest.raises(spd.InputError, match=r"d = 8, but .*gives 16"):
        spd.attach(model, spd.Subspace({0: narrow}, {0: narrow}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "factor"}, "mode"),
        ({"sides": "q"}, "sides"),
        ({"a": float("nan")}, "a: expected a finite number"),
        ({"b": float("inf")}, "b: expected a finite number"),
    ],
)
def test_bad_arguments_are_refused(changes, message, model, subspace_of):
    with pytest.raises(spd.InputError, match=message):
        spd.attach(model, subspace_of(model), **changes)


def test_bfloat16_folds_in_float64(make_model, tokenizer, subspace_of):
    exact = make_model("llama")
    subspace = subspace_of(exact)
    site = find_sites(exact)[3]
    u = subspace.v[3].basis.double()
    expected = (u @ u.T @ site.v.weight.detach().to(torch.bfloat16).double()).to(torch.bfloat16)
    half = exact.to(torch.bfloat16)
    with spd.attach(half, subspace):
        assert torch.equal(find_sites(half)[3].v.weight, expected)


def test_generation_under_fold_is_generation_under_hook(model, tokenizer, prompts, subspace_of):
    subspace = subspace_of(model)
    settings = {"temperature": 0.0, "max_new_tokens": 8, "progress": False}
    plain = spd.generate(model, tokenizer, prompts, **settings)
    with spd.attach(model, subspace, mode="hook"):
        hooked = spd.generate(model, tokenizer, prompts, **settings)
    with spd.attach(model, subspace, mode="fold"):
        found = spd.generate(model, tokenizer, prompts, **settings)
    assert found == hooked
    assert found != plain
