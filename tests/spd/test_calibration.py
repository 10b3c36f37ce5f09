"""Calibration against the method written out plainly: one example at a time, all rows kept, full SVD in float64."""

import pytest
import torch
from families import FAMILIES

import spd
from spd import gradients
from spd.sites import find_sites
from spd.spans import encode_examples


def plain_rows(model, tokenizer, examples, layer, side, full=False):
    """Every gradient row at one site, (N, d) float64, by autograd on each example alone."""
    projection = find_sites(model)[layer].side(side)
    rows = []
    for encoded in encode_examples(tokenizer, examples, max_length=256, full=full):
        kept = []

        def keep(module, args, output, kept=kept):
            kept.append(output)

        handle = projection.module.register_forward_hook(keep)
        log_p = model(torch.tensor([encoded.tokens])).logits[0].log_softmax(-1)
        handle.remove()
        loss = -torch.stack([log_p[t - 1, encoded.tokens[t]] for t in encoded.targets]).mean()
        (gradient,) = torch.autograd.grad(loss, kept)
        rows.append(projection.read(gradient)[0].double())
    return torch.cat(rows)


def projector(basis):
    u = basis.basis.double()
    return u @ u.T


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_and_spectra_are_those_of_the_plain_method(family, make_model, tokenizer, examples):
    model = make_model(family)
    subspace = spd.calibrate(model, tokenizer, examples, rank=5, progress=False)
    assert subspace.layers == [2, 3]
    for layer in subspace.layers:
        for side in "kv":
            rows = plain_rows(model, tokenizer, examples, layer, side)
            _, singular_values, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
            found = subspace.side(side)[layer]
            torch.testing.assert_close(
                found.singular_values, singular_values, rtol=1e-4, atol=1e-5 * float(singular_values[0])
            )
            best = vectors[:5].T @ vectors[:5]
            torch.testing.assert_close(projector(found), best, rtol=0, atol=2e-3)
            captured = float(((rows - rows.mean(0)) @ found.basis.double()).square().sum())
            assert captured >= (1 - 1e-6) * float(singular_values[:5].square().sum())
    assert subspace.provenance["rows"] == len(rows)


@pytest.mark.parametrize("center", [True, False])
def test_centring_and_full_loss(center, model, tokenizer, examples):
    subspace = spd.calibrate(model, tokenizer, examples, loss="full", center=center, layers=[1], progress=False)
    rows = plain_rows(model, tokenizer, examples, 1, "k", full=True)
    rows = rows - center * rows.mean(0)
    expected = torch.linalg.svdvals(rows)
    torch.testing.assert_close(subspace.k[1].singular_values, expected, rtol=1e-4, atol=1e-5 * float(expected[0]))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_size_padding_and_order_do_not_matter(batch_size, padding_side, model, tokenizer, examples):
    reference = spd.calibrate(model, tokenizer, examples, progress=False)
    before, tokenizer.padding_side = tokenizer.padding_side, padding_side
    try:
        other = spd.calibrate(model, tokenizer, examples[::-1], batch_size=batch_size, progress=False)
    finally:
        tokenizer.padding_side = before
    for layer in reference.layers:
        for side in "kv":
            a, b = reference.side(side)[layer], other.side(side)[layer]
            torch.testing.assert_close(projector(a), projector(b), rtol=0, atol=1e-4)
            torch.testing.assert_close(a.singular_values, b.singular_values, rtol=1e-5, atol=1e-9)
    assert reference.provenance["rows"] == other.provenance["rows"]


def test_the_subspace_depends_on_the_spans(model, tokenizer, examples):
    """The control of the invariance test: what should change the subspace does."""
    on_answers = spd.calibrate(model, tokenizer, examples, progress=False)
    elsewhere = [spd.Example(e.prompt, e.completion, [(9, 20)]) for e in examples]
    on_questions = spd.calibrate(model, tokenizer, elsewhere, progress=False)
    assert float((projector(on_answers.v[2]) - projector(on_questions.v[2])).abs().max()) > 0.05


def test_the_model_is_left_as_it_was(model, tokenizer, examples):
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    spd.calibrate(model, tokenizer, examples, progress=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("scaled", [True, False])
def test_half_precision_gradients_do_not_underflow(scaled, model, tokenizer, examples, monkeypatch):
    """Gradients below 1e-7, where float16 has no digits: right with the scaled loss, wrong without (the control)."""
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0**-9)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(2.0**-10)
    single = spd.calibrate(model, tokenizer, examples, rank=4, progress=False)
    if not scaled:
        monkeypatch.setattr(gradients, "INITIAL_FP16_SCALE", 1.0)
    half = spd.calibrate(model.half(), tokenizer, examples, rank=4, progress=False)
    overlaps = [
        float(torch.linalg.svdvals(single.v[layer].basis.T @ half.v[layer].basis)[-1]) for layer in single.layers
    ]
    assert (min(overlaps) > 0.99) is scaled


def test_an_overflowing_batch_is_taken_again_at_a_smaller_scale(model, tokenizer, examples, monkeypatch):
    model = model.half()
    expected = spd.calibrate(model, tokenizer, examples, rank=4, progress=False)
    monkeypatch.setattr(gradients, "INITIAL_FP16_SCALE", 2.0**40)
    found = spd.calibrate(model, tokenizer, examples, rank=4, progress=False)
    assert found.provenance["rows"] == expected.provenance["rows"]
    for layer in expected.layers:
        overlap = torch.linalg.svdvals(expected.v[layer].basis.T @ found.v[layer].basis)[-1]
        assert float(overlap) > 0.99


def test_gradients_are_on_inside_the_call_only(model, tokenizer, examples):
    with torch.no_grad():
        spd.calibrate(model, tokenizer, examples, rank=4, progress=False)
        assert not torch.is_grad_enabled()


def test_examples_without_a_surviving_span_are_counted_and_named(model, tokenizer, examples):
    mixed = [examples[0], spd.Example("no", " span"), examples[1], spd.Example("x" * 300, "yz", [(300, 302)])]
    with pytest.warns(UserWarning, match=r"2 of 4 examples have no surviving span: \[1, 3\]"):
        subspace = spd.calibrate(model, tokenizer, mixed, rank=2, progress=False)
    assert subspace.provenance["examples"] == 2
    assert subspace.provenance["examples_without_span"] == [1, 3]
    assert subspace.provenance["spans_cut"] == 1


def test_no_surviving_span_at_all_is_an_error(model, tokenizer):
    with pytest.raises(spd.InputError, match="none of the 2"):
        spd.calibrate(model, tokenizer, [spd.Example("no", " span")] * 2, progress=False)


def test_an_empty_calibration_set_is_an_error(model, tokenizer):
    with pytest.raises(spd.InputError, match="at least one"):
        spd.calibrate(model, tokenizer, [], progress=False)


def test_a_broken_gradient_names_layer_and_example(model, tokenizer, examples):
    poison = tokenizer("~")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    mixed = [*examples[:4], spd.Example("Question ~", " answer", [(11, 17)]), *examples[4:]]
    with pytest.raises(spd.InputError, match=r"at K of layer 2 is NaN or infinite for example 4 \(1 examples"):
        spd.calibrate(model, tokenizer, mixed, progress=False)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("rank", "expected"), [("half", 8), (3, 3), (16, 16), ("energy:1.0", 16)])
def test_ranks(rank, expected, model, tokenizer, examples):
    assert spd.calibrate(model, tokenizer, examples, rank=rank, progress=False).k[2].rank == expected


def test_energy_rank_is_the_smallest_that_reaches_it(model, tokenizer, examples):
    basis = spd.calibrate(model, tokenizer, examples, rank="energy:0.9", progress=False).v[3]
    assert basis.energy() >= 0.9 > basis.energy(basis.rank - 1)


def test_too_few_rows_for_the_rank_are_warned_about(model, tokenizer):
    with pytest.warns(UserWarning, match="arbitrary"):
        spd.calibrate(model, tokenizer, [spd.Example("ab", "cd", [(2, 4)])], progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 17}, "at most d = 16"),
        ({"rank": "energy:2"}, "energy:2"),
        ({"rank": "quarter"}, "quarter"),
        ({"loss": "answers"}, "answers"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_bad_settings_are_refused(changes, message, model, tokenizer, examples):
    with pytest.raises(spd.InputError, match=message):
        spd.calibrate(model, tokenizer, examples, progress=False, **changes)
