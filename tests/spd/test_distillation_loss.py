"""The loss of a batch however it is laid out, in parts or whole, and what it takes of memory."""

from types import MethodType

import pytest
import torch
import transformers
from families import FAMILIES, GROUPED, MORE_FAMILIES, WIDTHS
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode

import spd
from spd.adapters import with_lora
from spd.training import layout, loss
from spd.training.layout import Layout, pack
from spd.training.loss import SummedLoss
from spd.training.texts import IGNORED, Text, collate


def texts(*lengths, start=1, ignored=0):
    made = []
    for length in lengths:
        tokens = [(start + 7 * place) % 290 + 1 for place in range(length)]
        made.append(Text(tokens, [IGNORED] * ignored + tokens[ignored:], cut=False))
        start += 31
    return made


def tuned(model):
    """A peft model whose adapter does something."""
    torch.manual_seed(0)
    made = with_lora(model, spd.Recipe(lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made.eval()


def value_and_gradients(model, of, batch):
    model.zero_grad()
    total = of(**batch)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0.0)
    assert one[1].keys() == other[1].keys() and one[1]
    scale = max(float(gradient.abs().max()) for gradient in one[1].values())
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "cohere"])
@pytest.mark.parametrize("ignored", [0, 5])
def test_the_loss_in_parts_is_the_loss(family, ignored, make_model, monkeypatch):
    """Whether the model's own output layer ends it, or something after it, as in Gemma 2 and Cohere."""
    model = tuned(make_model(family))
    batch = collate(texts(24, 9, 17, ignored=ignored))
    whole = value_and_gradients(model, SummedLoss(model), batch)
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    counted = (batch["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(whole[0] / counted, plain.detach(), rtol=1e-5, atol=0.0)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 7 * 300)
    in_parts = SummedLoss(model)
    assert in_parts.in_parts == (family not in ("gemma2", "cohere"))
    assert_same(value_and_gradients(model, in_parts, batch), whole)


def test_hidden_states_wider_than_the_head(make_model, monkeypatch):
    """As autocast on a GPU leaves them: a norm's result in float32 before a head in half precision."""
    model = tuned(make_model("gpt_neox").bfloat16())
    inner = model.get_base_model()
    norm = inner.gpt_neox.final_layer_norm
    own = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: own(x).float())
    cast = torch.autocast("cpu", dtype=torch.bfloat16)(type(inner).forward)
    monkeypatch.setattr(inner, "forward", MethodType(cast, inner))
    batch = collate(texts(24, 9, 17))
    whole = value_and_gradients(model, SummedLoss(model), batch)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 7 * 300)
    in_parts = SummedLoss(model)
    assert in_parts.in_parts
    found = value_and_gradients(model, in_parts, batch)
    torch.testing.assert_close(found[0], whole[0], rtol=1e-3, atol=0.0)
    scale = max(float(gradient.abs().max()) for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0.0, atol=2e-2 * scale)


def test_a_gpu_takes_more_logits_at_once():
    assert loss.logits_at_once(torch.device("cuda", 1)) == 1 << 26
    assert loss.logits_at_once(torch.device("cpu")) == 1 << 22


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation made, views of a weight aside."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight.untyped_storage().data_ptr()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() != self.weight:
                self.elements = max(self.elements, each.numel())
        return result


def test_memory_does_not_grow_with_tokens_times_vocabulary(make_model, monkeypatch):
    vocabulary = 40_000
    model = tuned(make_model("qwen3", vocab_size=vocabulary, tie_word_embeddings=False))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * vocabulary)
    summed = SummedLoss(model)
    for count in (1, 4):
        with Largest(summed.head.weight) as largest:
            summed(**collate(texts(*[60] * count))).backward()
        assert largest.elements <= max(4 * vocabulary, count * 60 * 64)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 1 << 40)
    with Largest(summed.head.weight) as largest:
        summed(**collate(texts(*[60] * 4))).backward()
    assert largest.elements == 4 * 60 * vocabulary


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_has_the_loss_of_padded_rows(family, make_model):
    model = tuned(make_model(family))
    assert Layout(model).keeps_apart
    batch = texts(70, 3, 90, 11)  # longer than the window of the family that has one
    summed = SummedLoss(model)
    assert_same(value_and_gradients(model, summed, pack(batch)), value_and_gradients(model, summed, collate(batch)))


def test_texts_in_one_row_do_not_see_each_other(make_model):
    model = tuned(make_model("qwen3")).eval()

    def logits(first):
        batch = pack([*texts(20, start=first), *texts(15, start=99)])
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    assert not torch.equal(logits(1)[:, :20], logits(50)[:, :20])
    assert torch.equal(logits(1)[:, 20:], logits(50)[:, 20:])


def test_a_model_that_mixes_texts_gets_padded_rows(make_model, monkeypatch):
    model = tuned(make_model("qwen3"))
    uneven = texts(100, 2, 2, 2)
    assert "position_ids" in Layout(model).batch(uneven)

    def without_positions(together):
        return {name: each for name, each in pack(together).items() if name != "position_ids"}

    monkeypatch.setattr(layout, "pack", without_positions)
    assert not Layout(model).keeps_apart
    assert Layout(model).batch(uneven).keys() == collate(uneven).keys()


HYBRIDS = {
    "Lfm2": GROUPED | {"layer_types": ["conv", "full_attention"] * 2},
    "FalconH1": GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "Jamba": GROUPED | {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "Qwen3Next": GROUPED
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 8, "num_experts": 2}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
MIXING: dict[str, dict[str, object]] = HYBRIDS | {
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": WIDTHS | {"alibi": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_texts_get_padded_rows_in_any_precision(name, dtype, monkeypatch):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=300, **MIXING[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    chosen = Layout(model)
    assert chosen._only_attends == (name not in HYBRIDS)
    assert not chosen.keeps_apart
    monkeypatch.setattr(Layout, "_only_attends", True)
    assert not Layout(model).keeps_apart, "seen in the logits too"


@pytest.mark.parametrize("family", sorted((FAMILIES | MORE_FAMILIES).keys() - {"gpt_oss"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_one_row(family, dtype, make_model):
    assert Layout(tuned(make_model(family).to(dtype))).keeps_apart


def test_the_weights_tell_the_precision_of_logits_in_float32(make_model, monkeypatch):
    own = Layout._logits

    def rounded(self, batch, device):
        return own(self, batch, device).float() * (1.0 if "position_ids" in batch else 1.01)

    monkeypatch.setattr(Layout, "_logits", rounded)
    assert Layout(make_model("qwen3").bfloat16()).keeps_apart
    assert not Layout(make_model("qwen3")).keeps_apart


def test_one_row_where_padding_costs_more(make_model):
    chosen = Layout(tuned(make_model("qwen3")))
    assert chosen.gain([40]) == pytest.approx(1.0)
    assert chosen.gain([40, 40, 40, 40]) < 1.0  # no padding to save, only pairs to lose
    assert chosen.gain([40, 5, 5, 5]) > layout.PAYS
    chosen.per_pair = 0.0  # as in a model that is very wide
    assert chosen.gain([40, 5, 5, 5]) == pytest.approx(160 / 55)
    assert "position_ids" not in chosen.batch(texts(40, 40, 40, 40))


@pytest.mark.parametrize("lengths", [(43, 31, 62, 50), (200, 12, 60, 30)])
def test_the_first_loss_is_that_of_fixed_padding(lengths, make_model):
    model = make_model("qwen3")
    batch = texts(*lengths)
    padded = collate(batch)
    labels = pad(padded["labels"], (0, 256 - max(lengths)), value=IGNORED)
    ids, mask = (pad(padded[name], (0, 256 - max(lengths))) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        plain = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        own = SummedLoss(model)(**Layout(model).batch(batch)) / sum(text.targets for text in batch)
    assert float(own) == pytest.approx(float(plain), abs=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(model, tokenizer, prompts, tmp_path):
    generations = [spd.Generation(i, prompt, " an answer", [], finished=True) for i, prompt in enumerate(prompts[:8])]
    recipe = spd.Recipe(epochs=2, learning_rate=1e-2, lora_dropout=0.1)
    attributes = [dict(vars(module)) for module in model.modules()]
    found = []
    for wanted in (False, True):
        out = tmp_path / f"adapter-{wanted}"
        spd.distill(
            model, tokenizer, generations, out=out, recipe=recipe, gradient_checkpointing=wanted, progress=False
        )
        found.append(load_file(out / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    for module, before in zip(model.modules(), attributes, strict=True):
        assert {name for name in vars(module) if "checkpoint" in name} == {n for n in before if "checkpoint" in n}


def test_a_model_without_checkpointed_layers_is_refused(model, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("spd.model_state.GradientCheckpointingLayer", torch.nn.Conv3d)
    given = [spd.Generation(0, prompts[0], " an answer", [], finished=True)]
    with pytest.raises(spd.InputError, match="gradient_checkpointing: the layers of"):
        spd.distill(model, tokenizer, given, out=tmp_path / "a", gradient_checkpointing=True, progress=False)
    assert not (tmp_path / "a").exists()


def test_accelerate_configured_for_shards_is_refused(model, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    given = [spd.Generation(0, prompts[0], " an answer", [], finished=True)]
    with pytest.raises(spd.InputError, match="accelerate is configured for FSDP"):
        spd.distill(model, tokenizer, given, out=tmp_path / "a", progress=False)
    assert list(tmp_path.iterdir()) == []
