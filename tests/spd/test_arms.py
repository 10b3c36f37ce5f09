"""Arms are one line of text: options in a fixed order, defaults left out, errors that name what was meant."""

import pytest

import spd
from spd.arms import ARMS, SSD, parse_arm, parse_arms, without


@pytest.mark.parametrize("name", list(ARMS))
def test_the_five_words(name):
    assert parse_arm(name) is ARMS[name]


@pytest.mark.parametrize(
    ("text", "name", "slug"),
    [
        ("spd:rank=16", "spd:rank=16", "spd-rank=16"),
        ("spd:layers=all, rank=16", "spd:rank=16,layers=all", "spd-rank=16,layers=all"),
        ("spd:rank=energy:0.95", "spd:rank=energy:0.95", "spd-rank=energy-0.95"),
        ("spd:layers=3+7", "spd:layers=3+7", "spd-layers=3+7"),
        ("projected:subspace=random", "projected:subspace=random", "projected-subspace=random"),
        ("spd:subspace=gradient", "spd", "spd"),
        ("spd:rounds=1", "spd", "spd"),
        ("self-training:rounds=2", "self-training:rounds=2", "self-training-rounds=2"),
        ("ssd:lr=0.0010", "ssd:lr=0.001", "ssd-lr=0.001"),
        ("spd:lr=1e-5,sides=k", "spd:sides=k,lr=1e-05", "spd-sides=k,lr=1e-05"),
    ],
)
def test_options_have_one_spelling(text, name, slug):
    arm = parse_arm(text)
    assert (arm.name, arm.slug) == (name, slug)
    assert parse_arm(arm.name) == arm


def test_options_mean_something():
    arm = parse_arm("spd:from=mmlu,loss=full,examples=20,layers=3+7,sides=v,rounds=3")
    projection = arm.projection
    assert (projection.source, projection.loss, projection.examples, projection.layers, projection.sides) == (
        *("mmlu", "full", 20, (3, 7), "v"),
    )
    assert arm.rounds == 3
    assert "calibrated on mmlu" in arm.meaning
    assert "3 rounds" in arm.meaning


def test_the_published_sampling_of_simple_self_distillation():
    assert ARMS["ssd"].sampling == SSD
    assert (SSD.temperature, SSD.top_k, SSD.top_p) == (1.6, 20, 0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spdd", "no 'spdd'.*did you mean 'spd'"),
        ("spd:", "no option ''"),
        ("spd:rnk=3", "did you mean 'rank'"),
        ("spd:rank", "expected OPTION=VALUE, got 'rank'"),
        ("spd:rank=0", "rank: expected .* got 0"),
        ("spd:rank=2,rank=3", "rank is given twice"),
        ("spd:subspace=rando", "did you mean 'random'"),
        ("spd:layers=3-7", "or indices such as 3\\+7, got '3-7'"),
        ("spd:examples=none", "expected a positive number, got 'none'"),
        ("spd:lr=-1", "expected a positive number, got '-1'"),
        ("base:rank=2", "base has no projection"),
        ("base:rounds=2", "base has no training"),
        ("self-training:sides=k", "self-training has no projection"),
        ("projected:rounds=2", "projected has no training"),
    ],
)
def test_bad_arms_are_named(text, message):
    with pytest.raises(spd.InputError, match=message):
        parse_arm(text)


def test_the_base_is_always_there_and_first_and_nothing_is_twice():
    assert [arm.name for arm in parse_arms(["spd", "spd:rank=4", "spd:rounds=1"])] == ["base", "spd", "spd:rank=4"]


def test_an_option_can_be_left_out():
    assert without(parse_arm("spd:rank=4,sides=k"), "rank").name == "spd:sides=k"
    assert without(parse_arm("spd:from=gsm8k"), "from") is ARMS["spd"]
    assert without(ARMS["spd"], "rank") is ARMS["spd"]
