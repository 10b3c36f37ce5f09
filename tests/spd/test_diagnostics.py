"""Divergences against the plain float64 formula, zero where nothing changed, and flags that hold their level."""

import math
import random
from dataclasses import replace

import pytest
import torch
from oracles import mcnemar

import spd
from spd import diagnostics
from spd.controls import random_subspace
from spd.diagnostics import (
    changes,
    distribution_shift,
    divergences,
    expected_overlap,
    neutral_nll,
    neutral_texts,
    overlap,
    regressions,
)
from spd.stats import holm, mean_interval, paired_mean_test, ratio_interval


@pytest.fixture(scope="module")
def made(make_model, tokenizer, examples, tmp_path_factory):
    """A model, its subspace, what it wrote under projection, an adapter trained on that, and one that does nothing."""
    model = make_model("qwen3")
    subspace = spd.calibrate(model, tokenizer, examples, progress=False)
    prompts = [example.prompt for example in examples[:7]]
    with spd.attach(model, subspace):
        generations = spd.generate(model, tokenizer, prompts, max_new_tokens=12, progress=False)
    folder = tmp_path_factory.mktemp("adapters")
    moved = spd.Recipe(learning_rate=3e-2, epochs=3, warmup_epochs=0)
    adapters = {}
    for name, recipe in (("moved", moved), ("identity", replace(moved, learning_rate=1e-30, epochs=1))):
        adapters[name] = spd.distill(model, tokenizer, generations, out=folder / name, recipe=recipe, progress=False)
    return model, subspace, generations, adapters


@pytest.fixture(scope="module")
def shift(made, tokenizer):
    model, subspace, generations, adapters = made
    return distribution_shift(model, tokenizer, subspace, adapters["moved"], generations, progress=False)


def plain_log_p(model, tokenizer, generations):
    """For every text log p (completion tokens, vocabulary) in float64, from all logits of the text alone."""
    found = []
    for generation in generations:
        prompt = tokenizer(generation.prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + generation.tokens])).logits[0]
        found.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
    return found


def test_it_is_the_plain_formula(made, shift, tokenizer):
    model, subspace, generations, adapters = made
    base = plain_log_p(model, tokenizer, generations)
    with spd.attach(model, subspace, mode="hook"):
        projected = plain_log_p(model, tokenizer, generations)
    with spd.adapted(model, adapters["moved"]) as state:
        tuned = plain_log_p(state, tokenizer, generations)

    def kl(ps, qs):
        rows = [(p.exp() * (p - q)).sum(-1) for p, q in zip(ps, qs, strict=True)]
        return float(torch.cat(rows).mean()), [float(each.sum()) for each in rows]

    for found, (expected, _) in (
        (shift.projected_tuned, kl(projected, tuned)),
        (shift.projected_base, kl(projected, base)),
        (shift.tuned_base, kl(tuned, base)),
    ):
        middle, low, high = found
        assert middle == pytest.approx(expected, rel=1e-4)
        assert low < middle < high and middle > 1e-3
    assert shift.tokens == sum(len(generation.tokens) for generation in generations)
    assert shift.texts == len(generations)
    kept, low, high = shift.kept
    assert kept == pytest.approx(1 - shift.projected_tuned[0] / shift.projected_base[0], rel=1e-9)
    assert low < kept < high


@pytest.mark.parametrize(("batch_size", "group_bytes"), [(1, 1), (3, 2 * 300 * 4 * 40), (64, 2**30)])
def test_batches_and_groups_do_not_matter(batch_size, group_bytes, made, shift, tokenizer, monkeypatch):
    model, subspace, generations, adapters = made
    monkeypatch.setattr(diagnostics, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(diagnostics, "KL_NUMBERS", 1000)
    groups = list(diagnostics._groups(model, diagnostics._encode(model, tokenizer, generations), batch_size))
    assert sorted(index for group in groups for batch in group for index in batch) == list(range(len(generations)))
    assert (len(groups) == 1) is (batch_size == 64)
    found = distribution_shift(
        model, tokenizer, subspace, adapters["moved"], generations, batch_size=batch_size, progress=False
    )
    for name in ("projected_tuned", "projected_base", "tuned_base", "kept"):
        assert getattr(found, name) == pytest.approx(getattr(shift, name), rel=1e-3)
    assert (found.texts, found.tokens) == (shift.texts, shift.tokens)


def test_an_adapter_that_does_nothing_keeps_nothing(made, tokenizer):
    model, subspace, generations, adapters = made
    found = distribution_shift(model, tokenizer, subspace, adapters["identity"], generations, progress=False)
    assert found.tuned_base == pytest.approx((0, 0, 0), abs=1e-9)
    assert found.projected_tuned == pytest.approx(found.projected_base, rel=1e-4)
    assert found.kept == pytest.approx((0, 0, 0), abs=1e-4)


def test_a_full_subspace_shifts_nothing_that_could_be_kept(made, tokenizer, examples):
    model, _, generations, adapters = made
    full = spd.calibrate(model, tokenizer, examples, rank="full", progress=False)
    found = distribution_shift(model, tokenizer, full, adapters["moved"], generations, progress=False)
    assert found.projected_base == pytest.approx((0, 0, 0), abs=1e-9)
    assert found.kept is None
    assert found.projected_tuned[0] > 1e-3


def test_a_blend_reaches_the_attachment(made, shift, tokenizer):
    model, subspace, generations, adapters = made
    found = distribution_shift(model, tokenizer, subspace, adapters["moved"], generations, a=1.0, b=0.0, progress=False)
    assert found.projected_base == pytest.approx((0, 0, 0), abs=1e-9)
    assert found.tuned_base == pytest.approx(shift.tuned_base, rel=1e-6)


def test_the_interval_of_a_divergence_stays_above_zero():
    """One heavy text among ten: Student's interval reaches below zero, the bootstrap's does not."""
    sums, tokens = [0.01] * 9 + [5.0], [10] * 10
    middle, low, high = diagnostics._bootstrapped(sums, tokens)
    assert middle == pytest.approx(0.0509)
    assert low == pytest.approx(0.001)
    assert middle < high < 0.5
    assert ratio_interval(sums, tokens)[1] < 0


def test_a_policy_that_is_the_tuned_model_keeps_all(made, tokenizer, monkeypatch):
    """The tuned model in the place of the projected one: what survives is everything."""
    model, subspace, generations, adapters = made
    monkeypatch.setattr(diagnostics, "attach", lambda model, subspace, **_: spd.adapted(model, adapters["moved"]))
    found = distribution_shift(model, tokenizer, subspace, adapters["moved"], generations, progress=False)
    assert found.kept == pytest.approx((1, 1, 1), abs=1e-6)
    assert found.projected_base == pytest.approx(found.tuned_base)


@pytest.mark.parametrize(("sides", "mode"), [("k", "hook"), ("v", "fold"), ("kv", "hook"), ("kv", "latent_v")])
def test_sides_and_modes_reach_the_attachment(sides, mode, made, shift, tokenizer):
    model, subspace, generations, adapters = made
    found = distribution_shift(
        model, tokenizer, subspace, adapters["moved"], generations, sides=sides, mode=mode, progress=False
    )
    assert found.tuned_base == pytest.approx(shift.tuned_base, rel=1e-6)
    same = found.projected_base == pytest.approx(shift.projected_base, rel=1e-3)
    assert same is (sides == "kv")


def test_the_model_is_left_as_it_was(made, tokenizer, shift):
    model, *_ = made
    assert not hasattr(model, "peft_config")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_divergences(monkeypatch):
    torch.manual_seed(0)
    p, q = 5 * torch.randn(2, 9, 50)
    a, b = p.double().softmax(-1), q.double().softmax(-1)
    logits = {"p": p, "q": q, "moved": p + 3.0}
    for numbers in (1, 200, 10**6):
        monkeypatch.setattr(diagnostics, "KL_NUMBERS", numbers)
        found = divergences(logits, {"there": ("p", "q"), "back": ("q", "p"), "none": ("p", "moved")})
        torch.testing.assert_close(found["there"], (a * (a / b).log()).sum(-1), rtol=1e-10, atol=0)
        torch.testing.assert_close(found["back"], (b * (b / a).log()).sum(-1), rtol=1e-10, atol=0)
        assert float(found["none"].abs().max()) < 1e-9


def test_what_gives_no_shift_is_refused(made, tokenizer, make_model):
    model, subspace, generations, adapters = made
    for given, message in (
        (generations[:1], "^generations: expected at least two, for an interval, got 1"),
        ([*generations, replace(generations[0], tokens=[])], "^generations: 1 of 8 have no token to score: 7"),
        ([*generations, replace(generations[0], tokens=[5] * 600)], "^generations: 1 of 8 are longer than 512 tokens"),
    ):
        with pytest.raises(spd.InputError, match=message):
            distribution_shift(model, tokenizer, subspace, adapters["moved"], given, progress=False)
    with pytest.raises(spd.InputError, match="configuration differs"):
        distribution_shift(make_model("llama"), tokenizer, subspace, adapters["moved"], generations, progress=False)


# Off target


def test_perplexity_of_neutral_texts(model, tokenizer):
    texts = neutral_texts(6, seed=0)
    found = neutral_nll(model, tokenizer, texts, progress=False)
    total = count = 0
    for text, own in zip(texts, found.texts, strict=True):
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = float(model(input_ids=tokens, labels=tokens).loss)
        assert own.tokens == tokens.shape[1] - 1
        assert own.per_token == pytest.approx(loss, rel=1e-4)
        total, count = total + loss * own.tokens, count + own.tokens
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.low < found.value < found.high
    with pytest.raises(spd.InputError, match="texts: expected at least two"):
        neutral_nll(model, tokenizer, texts[:1], progress=False)


def test_neutral_texts_are_what_the_carried_model_knows():
    assert neutral_texts(30, 0) == neutral_texts(40, 0)[:30] != neutral_texts(30, 1)
    model, tokenizer = spd.load_model("proving-ground", device="cpu")
    texts = neutral_texts(40, 0)
    assert neutral_nll(model, tokenizer, texts, progress=False).value < 4  # of 640 tokens
    backwards = [" ".join(reversed(text.split(" "))) for text in texts]
    assert neutral_nll(model, tokenizer, backwards, progress=False).value > 10


def test_overlap(model, tokenizer, examples):
    half = spd.calibrate(model, tokenizer, examples, progress=False)
    few = spd.calibrate(model, tokenizer, examples, rank=3, progress=False)
    full = spd.calibrate(model, tokenizer, examples, rank="full", progress=False)
    assert overlap(half, few).keys() == {(layer, side) for layer in (2, 3) for side in "kv"}
    for pair in ((half, half), (half, few), (few, half), (few, full)):
        assert list(overlap(*pair).values()) == pytest.approx([1.0] * 4, abs=1e-5)
        assert max(overlap(*pair).values()) <= 1.0
    turned = spd.Subspace(
        {
            layer: spd.Basis(basis.basis @ torch.linalg.qr(torch.randn(8, 8)).Q, basis.singular_values)
            for layer, basis in half.k.items()
        },
        half.v,
    )
    assert list(overlap(half, turned).values()) == pytest.approx([1.0] * 4, abs=1e-5)
    other = random_subspace(half, 0)
    for (layer, side), found in overlap(half, other).items():
        a, b = half.side(side)[layer].basis.double(), other.side(side)[layer].basis.double()
        assert found == pytest.approx(float(torch.linalg.svdvals(a.T @ b).square().mean()))


def test_random_subspaces_overlap_as_expected(model, tokenizer, examples):
    like = spd.calibrate(model, tokenizer, examples, rank=4, progress=False)
    first = random_subspace(like, 0)
    found = [each for seed in range(1, 60) for each in overlap(first, random_subspace(like, seed)).values()]
    middle, low, high = mean_interval(found)
    assert expected_overlap(4, 16) == 0.25
    assert middle == pytest.approx(0.25, abs=3 * (high - low) / 4)


def test_overlap_of_different_sites_is_refused(model, make_model, tokenizer, examples):
    like = spd.calibrate(model, tokenizer, examples, progress=False)
    with pytest.raises(spd.InputError, match=r"^b: expected the layers of a, \[2, 3\], got \[1\]"):
        overlap(like, spd.calibrate(model, tokenizer, examples, layers=[1], progress=False))
    with pytest.raises(spd.InputError, match=r"^b: expected d = 16 at K of layer 2, got 32"):
        overlap(like, spd.calibrate(make_model("gpt2"), tokenizer, examples, progress=False))


def test_changes_leave_out_what_was_not_judged():
    base = [True, False, None, True, False]
    arms = [[True, True, True, False, None], [False, True, True, None, None]]
    assert changes(base, arms) == [[0, -1], [1, 1], [-1]]


def test_a_task_that_fell_is_flagged():
    fallen = changes([True] * 40, [[n % 2 == 0 for n in range(40)]])
    risen = changes([False] * 40, [[n % 2 == 0 for n in range(40)]])
    noisy = changes([n % 2 == 0 for n in range(40)], [[n % 3 == 0 for n in range(40)]])
    texts = [[0.01 * (n % 5) - 0.05] for n in range(50)]  # log-likelihood of the arm less that of the base
    found = {each.task: each for each in regressions({"a": fallen, "b": risen, "c": noisy, "d": texts})}
    assert {task: each.fell for task, each in found.items()} == {"a": True, "b": False, "c": False, "d": True}
    assert (found["a"].change, found["b"].change) == (-0.5, 0.5)
    assert found["a"].p == found["b"].p == pytest.approx(mcnemar(20, 0))
    assert found["d"].p == pytest.approx(paired_mean_test([each for (each,) in texts]))
    assert [each.adjusted for each in found.values()] == pytest.approx(holm([each.p for each in found.values()]))
    with pytest.raises(spd.InputError, match="at least two questions of e, got 0"):
        regressions({"e": []})


def test_flags_are_rare_where_nothing_changed():
    """200 families of six tasks, 60 questions, two seeds: a false flag in at most some 2.5 % of them."""
    rng = random.Random(0)
    flagged = 0
    for _ in range(200):
        rows = {}
        for task in range(6):
            base = [rng.random() < 0.5 for _ in range(60)]
            arms = [[rng.random() < 0.5 for _ in range(60)] for _ in range(2)]
            rows[task] = changes(base, arms)
        flagged += any(each.fell for each in regressions(rows))
    assert flagged <= 12
