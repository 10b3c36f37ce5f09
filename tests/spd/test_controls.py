"""The controls: what they are by definition, that they fit the model, that no example keeps its label."""

import pytest
import torch

import spd
from spd.controls import activation_subspace, bottom_subspace, random_subspace, shuffled_labels
from spd.sites import find_sites
from spd.spans import encode_examples

FITTED = ("qwen2", "qwen3", "phi3")


def sites_of(subspace):
    return [(layer, side, subspace.side(side)[layer]) for layer in subspace.layers for side in "kv"]


def projector(basis):
    u = basis.basis.double()
    return u @ u.T


def made(kind, model, tokenizer, examples, like):
    if kind == "random":
        return random_subspace(like, 0)
    if kind == "bottom":
        return bottom_subspace(spd.calibrate(model, tokenizer, examples, rank="full", progress=False), like)
    return activation_subspace(model, tokenizer, examples, like, progress=False)


@pytest.mark.parametrize("family", FITTED)
@pytest.mark.parametrize("kind", ["random", "bottom", "activations"])
def test_they_stand_beside_the_subspace_and_attach(kind, family, make_model, tokenizer, examples, tmp_path):
    model = make_model(family)
    like = spd.calibrate(model, tokenizer, examples, rank="energy:0.9", progress=False)
    control = made(kind, model, tokenizer, examples, like)
    assert control.layers == like.layers
    for layer, side, basis in sites_of(control):
        r = like.side(side)[layer].rank
        assert basis.rank == r
        u = basis.basis.double()
        torch.testing.assert_close(u.T @ u, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-5)
    assert control.provenance["control"]["kind"] == kind
    assert {key: value for key, value in control.provenance.items() if key != "control"} == like.provenance

    control.save_pretrained(tmp_path)
    tokens = torch.tensor([tokenizer(examples[0].text)["input_ids"]])
    with torch.no_grad():
        plain = model(tokens).logits
        with spd.attach(model, like):
            projected = model(tokens).logits
        with spd.attach(model, spd.Subspace.from_pretrained(tmp_path, model)):
            found = model(tokens).logits
        assert torch.equal(model(tokens).logits, plain)
    assert float((found - plain).abs().max()) > 0.1 < float((found - projected).abs().max())


def test_random_ones_follow_the_seed(model, subspace_of):
    like = subspace_of(model)
    for (_, _, a), (_, _, b), (_, _, c) in zip(
        *(sites_of(random_subspace(like, seed)) for seed in (3, 3, 4)), strict=True
    ):
        assert torch.equal(a.basis, b.basis)
        assert float((projector(a) - projector(c)).abs().max()) > 0.05
    k, v = random_subspace(like, 3).k[2], random_subspace(like, 3).v[2]
    assert float((projector(k) - projector(v)).abs().max()) > 0.05
    assert k.energy() == pytest.approx(k.rank / k.width)


def test_random_ones_are_uniform(model, subspace_of):
    """E[U Uᵀ] = r / d I; 300 draws of (16, 8) leave an entry off by some 0.02."""
    like = subspace_of(model)
    mean = sum(projector(random_subspace(like, seed).k[2]) for seed in range(300)) / 300
    torch.testing.assert_close(mean, 0.5 * torch.eye(16, dtype=torch.float64), rtol=0, atol=0.08)


@pytest.mark.parametrize("r", [3, 8, 11])
def test_the_bottom_is_what_the_top_leaves(r, model, tokenizer, examples):
    full = spd.calibrate(model, tokenizer, examples, rank=16, progress=False)
    like = spd.calibrate(model, tokenizer, examples, rank=r, progress=False)
    for layer, side, basis in sites_of(bottom_subspace(full, like)):
        top = like.side(side)[layer]
        shared = float((top.basis.double().T @ basis.basis.double()).square().sum())
        assert shared == pytest.approx(max(0, 2 * r - 16), abs=1e-5)
        assert basis.energy() == pytest.approx(1 - top.energy(16 - r), abs=1e-9)
        assert (basis.singular_values.diff() >= 0).all()


def test_the_bottom_needs_all_directions_of_the_same_model(model, make_model, tokenizer, examples, subspace_of):
    like = subspace_of(model)
    with pytest.raises(spd.InputError, match=r"^full: expected all 16 directions of K at layer 2, it holds 8 of 16"):
        bottom_subspace(like, like)
    elsewhere = spd.calibrate(model, tokenizer, examples, layers=[1], rank="full", progress=False)
    with pytest.raises(spd.InputError, match="of K at layer 2, it holds nothing"):
        bottom_subspace(elsewhere, like)
    other = spd.calibrate(make_model("llama"), tokenizer, examples, rank="full", progress=False)
    with pytest.raises(spd.InputError, match="same model"):
        bottom_subspace(other, like)


@pytest.mark.parametrize("family", FITTED)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_activations_directions_are_those_of_a_plain_svd(family, batch_size, make_model, tokenizer, examples):
    model = make_model(family)
    mixed = [spd.Example("Question without", " a span"), *examples]
    like = spd.calibrate(model, tokenizer, examples, rank=5, progress=False)
    found = activation_subspace(model, tokenizer, mixed, like, batch_size=batch_size, progress=False)
    for layer, side, basis in sites_of(found):
        projection = find_sites(model)[layer].side(side)
        rows = []
        handle = projection.module.register_forward_hook(
            lambda module, args, output, rows=rows, read=projection.read: rows.append(read(output)[0].double())
        )
        with torch.no_grad():
            for each in encode_examples(tokenizer, examples, max_length=256):
                model(torch.tensor([each.tokens]))
        handle.remove()
        collected = torch.cat(rows)
        centred = collected - collected.mean(0)
        _, singular_values, vectors = torch.linalg.svd(centred, full_matrices=False)
        torch.testing.assert_close(
            basis.singular_values, singular_values, rtol=1e-5, atol=1e-6 * float(singular_values[0])
        )
        torch.testing.assert_close(projector(basis), vectors[:5].T @ vectors[:5], rtol=0, atol=1e-4)
        assert found.provenance["control"]["rows"] == len(collected) == like.provenance["rows"]


def test_activations_leave_the_model_as_it_was(model, tokenizer, examples, subspace_of):
    like = subspace_of(model)
    model.train()
    activation_subspace(model, tokenizer, examples, like, progress=False)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_activations_are_refused_where_they_would_be_of_something_else(model, make_model, tokenizer, examples):
    like = spd.calibrate(model, tokenizer, examples, progress=False)
    with spd.attach(model, like), pytest.raises(spd.InputError, match="carries an intervention"):
        activation_subspace(model, tokenizer, examples, like, progress=False)
    with pytest.raises(spd.InputError, match="configuration differs"):
        activation_subspace(make_model("llama"), tokenizer, examples, like, progress=False)
    with pytest.raises(spd.InputError, match="none of the 1 has a surviving span"):
        activation_subspace(model, tokenizer, [spd.Example("a", "b")], like, progress=False)
    unnamed = spd.Subspace({9: like.k[2]}, {9: like.v[2]})
    with pytest.raises(spd.InputError, match=r"^like: it has layers \[9\]"):
        activation_subspace(model, tokenizer, examples, unnamed, progress=False)


# Shuffled labels


def label(example):
    return [example.text[start:end] for start, end in example.spans]


def test_no_example_keeps_its_label(examples):
    shuffled = shuffled_labels(examples, 0)
    assert [each.prompt for each in shuffled] == [each.prompt for each in examples]
    assert sorted(each.completion for each in shuffled) == sorted(each.completion for each in examples)
    by_completion = {each.completion: label(each) for each in examples}
    for before, after in zip(examples, shuffled, strict=True):
        assert label(after) == by_completion[after.completion] != label(before)
    assert shuffled == shuffled_labels(examples, 0) != shuffled_labels(examples, 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_letter_that_many_share_is_not_kept_either(seed):
    """Half of the answers are the same: the most that can be shuffled."""
    choices = [spd.Example("Which?", f" {letter}", [(7, 8)]) for letter in "AAAAAABCDBCD"]
    shuffled = shuffled_labels(choices, seed)
    assert all(label(a) != label(b) for a, b in zip(choices, shuffled, strict=True))
    assert sorted(map(label, shuffled)) == sorted(map(label, choices))


def test_asserts_in_the_prompt_give_way_to_those_of_another():
    def program(name, asserts):
        prompt, spans = f"Write {name}.\n", []
        for n in range(asserts):
            line = f"assert {name}({n}) == {n}"
            spans.append((len(prompt), len(prompt) + len(line)))
            prompt += f"{line}\n"
        return spd.Example(f"{prompt}Code:\n", f"def {name}(x): return x", spans)

    names = ["add", "multiply", "f"]
    examples = [program("add", 2), program("multiply", 2), program("f", 3)]
    for number, (before, after) in enumerate(zip(examples, shuffled_labels(examples, 5), strict=True)):
        own = names[number]
        (partner,) = [name for name in names if after.completion == f"def {name}(x): return x"]
        assert partner != own
        assert after.prompt.startswith(f"Write {own}.\nassert {partner}(0) == 0\n") and after.prompt.endswith(
            "\nCode:\n"
        )
        assert f"{own}(" not in after.prompt
        assert len(after.spans) == len(before.spans)
        theirs = label(examples[names.index(partner)])
        assert label(after) == [theirs[n % len(theirs)] for n in range(len(before.spans))]


@pytest.mark.parametrize("seed", range(5))
def test_with_spans_exchanged_the_reasoning_stays_and_the_answer_does_not(seed, examples):
    shuffled = shuffled_labels(examples, seed, exchange="spans")
    assert sorted(map(label, shuffled)) == sorted(map(label, examples))
    for before, after in zip(examples, shuffled, strict=True):
        head, marked, _ = before.completion.partition("#### ")
        assert after.prompt == before.prompt
        assert after.completion == head + marked + label(after)[0] != before.completion


def test_without_spans_the_completion_is_the_label():
    examples = [spd.Example(f"{n}?", f" {n % 3}") for n in range(9)]
    shuffled = shuffled_labels(examples, 0)
    assert all(a.completion != b.completion and b.spans == [] for a, b in zip(examples, shuffled, strict=True))


def test_calibrating_on_shuffled_labels_gives_other_directions(model, tokenizer, examples):
    like = spd.calibrate(model, tokenizer, examples, progress=False)
    shuffled = spd.calibrate(model, tokenizer, shuffled_labels(examples, 0), progress=False)
    assert shuffled.layers == like.layers
    assert float((projector(like.v[2]) - projector(shuffled.v[2])).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([("q", " a", [(1, 3)])], "1 of 1 have the label"),
        ([("q", " a", [(1, 3)])] * 2 + [("q", " b", [(1, 3)])], "2 of 3 have the label ' a'"),
        ([("qr", " a", [(0, 2)]), ("qr", " a", [(2, 4)])], r"in every prompt or in none; without: \[1\]"),
        ([("qr", " a", [(1, 3)]), ("qr", " b", [(2, 4)])], "example 0 overlap"),
        ([("q", " abc", [(1, 3)]), ("q", " abc", [(1, 3), (2, 4)])], "example 1 overlap"),
    ],
)
def test_what_cannot_be_shuffled_is_refused(examples, message):
    with pytest.raises(spd.InputError, match=message):
        shuffled_labels([spd.Example(*each) for each in examples], 0)


def test_what_cannot_be_exchanged_is_refused(examples):
    with pytest.raises(spd.InputError, match=r'^exchange: expected "completions" or "spans"'):
        shuffled_labels(examples, 0, exchange="answers")
    with pytest.raises(spd.InputError, match="these have none"):
        shuffled_labels([spd.Example("q", "a"), spd.Example("q", "b")], 0, exchange="spans")
    with pytest.raises(spd.InputError, match=r"in every completion or in none; without: \[1\]"):
        shuffled_labels([spd.Example("q", "a", [(1, 2)]), spd.Example("q", "b")], 0, exchange="spans")
