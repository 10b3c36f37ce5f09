"""Calibration where memory is short: halved batches, layers computed again, weights on disk, half precision."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM

import spd
from spd import gradients
from spd.memory import FittingBatches, MemoryWarning, out_of_memory
from spd.model_state import frozen
from spd.sites import find_sites
from spd.spans import encode_examples


def assert_same_subspace(one: spd.Subspace, other: spd.Subspace, atol: float = 1e-5) -> None:
    for layer in one.layers:
        for side in "kv":
            a, b = one.side(side)[layer], other.side(side)[layer]
            torch.testing.assert_close(a.basis @ a.basis.T, b.basis @ b.basis.T, rtol=0, atol=atol)
            torch.testing.assert_close(a.singular_values, b.singular_values, rtol=1e-4, atol=atol)


def allocate_too_much() -> torch.Tensor:
    return torch.empty(2**50, dtype=torch.float64)


@pytest.fixture
def fits_three(model):
    """The model, whose backward pass runs out of memory between its layers if a batch has more than three texts."""

    def fail(gradient):
        if gradient.shape[0] > 3:
            allocate_too_much()

    def watch(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(fail)

    handle = model.model.layers[2].register_forward_hook(watch)
    yield model
    handle.remove()


def test_a_batch_that_does_not_fit_is_halved_and_nothing_of_it_counts(fits_three, make_model, tokenizer, examples):
    expected = spd.calibrate(make_model("qwen3"), tokenizer, examples, progress=False)
    with pytest.warns(MemoryWarning) as caught:
        found = spd.calibrate(fits_three, tokenizer, examples, batch_size=8, progress=False)
    said = [str(each.message) for each in caught]
    assert said == [
        "calibrate: 8 examples at a time do not fit in memory; going on with 4",
        "calibrate: 4 examples at a time do not fit in memory; going on with 2",
    ]
    assert found.provenance == expected.provenance
    assert_same_subspace(expected, found)


def test_a_deterministic_calibration_refuses_what_does_not_fit(fits_three, tokenizer, examples):
    with pytest.raises(spd.InputError, match="calibrate: deterministic: 8 examples at a time do not fit in memory"):
        spd.calibrate(fits_three, tokenizer, examples, deterministic=True, progress=False)


def test_a_deterministic_calibration_knows_no_batch_size(model, tokenizer, examples):
    one, other = (
        spd.calibrate(model, tokenizer, examples, batch_size=size, deterministic=True, progress=False)
        for size in (2, 5)
    )
    for layer in one.layers:
        assert torch.equal(one.k[layer].basis, other.k[layer].basis)
        assert torch.equal(one.v[layer].singular_values, other.v[layer].singular_values)


def test_the_sums_have_their_room_before_a_batch_counts(model, tokenizer, examples):
    """So that memory which runs out there halves the batch."""
    sums = gradients.GradientSums(model, [find_sites(model)[3]])
    with frozen(model):
        rows = sums.rows_of(encode_examples(tokenizer, examples[:2], max_length=256, full=True))
    assert {place: total.count for place, total in sums.totals.items()} == {(3, "k"): 0, (3, "v"): 0}
    sums.add(rows)
    assert sums.totals[3, "k"].count > 0


def test_one_example_that_does_not_fit_is_an_error(model, tokenizer, examples):
    def full(module, args):
        allocate_too_much()

    model.lm_head.register_forward_pre_hook(full)
    with pytest.raises(spd.InputError, match="not even one of the examples fits in memory"), pytest.warns(UserWarning):
        spd.calibrate(model, tokenizer, examples, progress=False)


def test_parts_come_in_order_and_later_batches_start_small():
    asked: list[list[int]] = []

    def work(part):
        asked.append(list(part))
        if sum(part) > 7:
            allocate_too_much()
        return list(part)

    batches = FittingBatches(4, caller="test", unit="numbers")
    with pytest.warns(UserWarning, match="going on with 2"):
        first = list(batches.run([1, 2, 3, 4], lambda part: work(part)))
    assert first == [[1, 2], [3, 4]]
    assert asked == [[1, 2, 3, 4], [1, 2], [3, 4]]
    assert list(batches.run([1, 1, 1], work)) == [[1, 1], [1]]


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert all(out_of_memory(each) for each in (caught.value, MemoryError(), torch.OutOfMemoryError()))
    for words in (
        "std::bad_alloc",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert out_of_memory(RuntimeError(words))
    assert not out_of_memory(ValueError("out of memory"))
    assert not any(out_of_memory(each) for each in (RuntimeError("shapes do not match"), KeyboardInterrupt()))

    def fail(part):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(FittingBatches(4, caller="test", unit="numbers").run([1, 2], fail))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family, make_model, tokenizer, examples):
    model = make_model(family)
    before = [dict(vars(module)) for module in model.modules()]
    expected = spd.calibrate(model, tokenizer, examples, progress=False)
    found = spd.calibrate(model, tokenizer, examples, gradient_checkpointing=True, progress=False)
    assert found.provenance == expected.provenance  # the number of rows among it
    assert_same_subspace(expected, found)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys() and module.training == attributes["training"]


def saved_bytes(model, tokenizer, examples, **settings) -> int:
    """What the passes keep for the way back, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    most, kept = 0, {}

    def pack(tensor):
        nonlocal most
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        most = max(most, sum(kept.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spd.calibrate(model, tokenizer, examples, progress=False, **settings)
    return most


def test_gradient_checkpointing_keeps_less(model, tokenizer, examples):
    settings = {"layers": "all", "batch_size": len(examples)}
    plain = saved_bytes(model, tokenizer, examples, **settings)
    assert saved_bytes(model, tokenizer, examples, gradient_checkpointing=True, **settings) < 0.5 * plain


def test_nothing_below_the_lowest_layer_is_kept(model, tokenizer, examples):
    every, last = (
        saved_bytes(model, tokenizer, examples, layers=layers, batch_size=len(examples)) for layers in ("all", "last")
    )
    assert last < 0.4 * every


def test_layers_that_would_drop_values_out_are_refused(make_model, tokenizer, examples):
    model = make_model("qwen3")
    model.model.layers[0].dropout = 0.1
    with pytest.raises(spd.InputError, match="gradient_checkpointing: Qwen3DecoderLayer would apply its dropout"):
        spd.calibrate(model, tokenizer, examples, gradient_checkpointing=True, progress=False)


def test_offloaded_weights(checkpoint, tokenizer, examples, tmp_path):
    """Two layers on disk, read when they are needed: the subspace, and what is said of the model, are the same."""
    whole, _ = spd.load_model(checkpoint)
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread |= {f"model.layers.{layer}": "disk" if layer in (1, 2) else "cpu" for layer in range(4)}
    offloaded = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=spread, offload_folder=tmp_path).eval()
    assert any(parameter.is_meta for parameter in find_sites(offloaded)[2].k.module.parameters())
    for settings in ({}, {"gradient_checkpointing": True}):
        expected = spd.calibrate(whole, tokenizer, examples, layers="all", progress=False)
        found = spd.calibrate(offloaded, tokenizer, examples, layers="all", progress=False, **settings)
        assert found.provenance == expected.provenance
        assert_same_subspace(expected, found)


@pytest.fixture
def faint(model):
    """The model, its gradients so small that float16 has no digits for them."""
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0**-9)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(2.0**-12)
    return model


def test_float16_and_float32_give_the_same_subspace(faint, tokenizer, examples):
    """Within what a float16 forward pass allows: the cosine of the largest angle between the leading directions."""
    single = spd.calibrate(faint, tokenizer, examples, rank=4, progress=False)
    half = spd.calibrate(faint.half(), tokenizer, examples, rank=4, progress=False)
    for layer in single.layers:
        one, other = single.v[layer], half.v[layer]
        assert float(torch.linalg.svdvals(one.basis.T @ other.basis)[-1]) > 0.99
        torch.testing.assert_close(one.singular_values[:4], other.singular_values[:4], rtol=0.02, atol=0)


def test_without_a_scaled_loss_they_would_be_zero(faint, tokenizer, examples, monkeypatch):
    """The control: unscaled, not one gradient at K of the last layer is left."""
    monkeypatch.setattr(gradients, "INITIAL_FP16_SCALE", 1.0)
    with pytest.raises(spd.InputError, match="every gradient at K of layer 3 is zero"):
        spd.calibrate(faint.half(), tokenizer, examples, layers="last", rank=4, progress=False)
