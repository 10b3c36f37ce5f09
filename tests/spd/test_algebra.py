"""Unions, intersections, complements and angles of subspaces, against planted spaces and the plain float64 formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spd
from spd import algebra
from spd.controls import random_subspace

WIDTH = 24


def random_basis(r, seed, d=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q


def projector(basis):
    basis = basis.double()
    return basis @ basis.T


def at_angles(degrees, seed=0, d=WIDTH):
    """Two bases whose principal angles are these."""
    r = len(degrees)
    frame, angles = random_basis(2 * r, seed, d), torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return frame[:, :r], frame[:, :r] * angles.cos() + frame[:, r:] * angles.sin()


def turned(basis, seed=0):
    return basis @ random_basis(basis.shape[1], seed, basis.shape[1])


def subspace(*bases, layers=(1, 3), provenance=None):
    """A subspace with the first basis as K of every layer and the last as V."""
    k, v = (spd.Basis(each.float(), torch.linspace(2, 1, len(each)).double()) for each in (bases[0], bases[-1]))
    return spd.Subspace(dict.fromkeys(layers, k), dict.fromkeys(layers, v), provenance or {})


ANGLES = [0.0, 1e-10, 1e-6, 0.001, 1.0, 30.0, 45.0, 60.0, 89.9999, 90.0]


@pytest.mark.parametrize("seed", range(3))
def test_angles_are_those_that_were_planted(seed):
    a, b = at_angles(ANGLES, seed)
    for one, other in ((a, b), (b, a), (turned(a), turned(b, 1))):
        found = algebra.principal_angles(one, other).rad2deg()
        torch.testing.assert_close(found, torch.tensor(ANGLES).double(), rtol=1e-6, atol=1e-12)


def test_small_angles_are_not_lost_as_by_the_cosines_alone():
    a, b = at_angles([1e-6, 2e-6])
    by_cosine = torch.linalg.svdvals(a.T @ b).clamp(max=1).acos().rad2deg().flip(0)
    expected = torch.tensor([1e-6, 2e-6]).double()
    torch.testing.assert_close(algebra.principal_angles(a, b).rad2deg(), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(by_cosine, expected, rtol=1e-2)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 8), (8, 3), (20, 20), (24, 5), (24, 24)])
def test_angles_are_those_of_the_plain_formula(ranks):
    a, b = random_basis(ranks[0], 0), random_basis(ranks[1], 1)
    plain = torch.linalg.svdvals(a.T @ b).clamp(max=1).acos()
    assert plain.shape == (min(ranks),)
    torch.testing.assert_close(algebra.principal_angles(a, b), plain, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 8), (8, 3), (15, 15), (24, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_union_contains_both_and_no_more(ranks, dtype):
    a, b = (random_basis(r, seed).to(dtype) for seed, r in enumerate(ranks))
    found = algebra.union(a, b)
    assert found.shape == (WIDTH, min(WIDTH, sum(ranks)))
    for basis in (a, b):
        torch.testing.assert_close(projector(found) @ basis.double(), basis.double(), rtol=0, atol=1e-6)
    both = torch.cat([a, b], dim=1).double()
    plain = both @ torch.linalg.pinv(both)
    torch.testing.assert_close(projector(found), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_union_counts_what_is_shared_once(dtype):
    a, b = at_angles([0.0, 0.0, algebra.SAME / 3, 3 * algebra.SAME, 50.0])
    found = algebra.union(turned(a).to(dtype), turned(b, 1).to(dtype))
    assert found.shape[1] == 2 * 5 - 3
    shared = a[:, :2]
    torch.testing.assert_close(projector(found[:, :3]) @ shared, shared, rtol=0, atol=1e-5)  # it comes first
    assert algebra.union(a, a[:, :2]).shape[1] == 5


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_first_of_a_union_are_closest_to_both(k):
    a, b = random_basis(4, 0), random_basis(5, 1)
    first = algebra.union(a, b)[:, :k]
    captured = float((first.T @ (projector(a) + projector(b)) @ first).trace())
    best = torch.linalg.eigvalsh(projector(a) + projector(b)).flip(0)[:k].sum()
    assert captured == pytest.approx(float(best))


@pytest.mark.parametrize("r", [1, 9, 23])
def test_a_complement_is_orthogonal_and_makes_the_identity(r):
    basis = random_basis(r, 0)
    rest = algebra.complement(basis)
    assert rest.shape == (WIDTH, WIDTH - r)
    assert float((basis.T @ rest).abs().max()) < 1e-12
    torch.testing.assert_close(projector(basis) + projector(rest), torch.eye(WIDTH).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_intersection_is_what_was_planted(dtype):
    a, b = at_angles([0.0, 0.0, 0.0, 20.0, 70.0])
    common, a, b = a[:, :3], turned(a, 1).to(dtype), turned(b, 2).to(dtype)
    for one, other in ((a, b), (b, a)):
        found = algebra.intersection(one, other, angle=1)
        torch.testing.assert_close(projector(found), projector(common), rtol=0, atol=1e-6)
    within = algebra.intersection(a, b, angle=21)
    assert within.shape[1] == 4
    for basis in (a, b):  # the fourth lies half-way
        to_it = algebra.principal_angles(within[:, 3:], basis).rad2deg()
        assert float(to_it) == pytest.approx(10, abs=1e-3)
    assert algebra.intersection(a[:, :0], b, angle=1).shape == (WIDTH, 0)


def test_rotating_a_basis_changes_nothing():
    a, b = random_basis(6, 0), random_basis(9, 1)
    for one, other in ((turned(a, 2), b), (a, turned(b, 3)), (-a, b)):
        torch.testing.assert_close(algebra.principal_angles(one, other), algebra.principal_angles(a, b))
        torch.testing.assert_close(projector(algebra.union(one, other)), projector(algebra.union(a, b)))
        found, expected = (algebra.intersection(*pair, angle=60) for pair in ((one, other), (a, b)))
        torch.testing.assert_close(projector(found), projector(expected))
    torch.testing.assert_close(projector(algebra.complement(turned(a))), projector(algebra.complement(a)))


@given(r=st.integers(1, 8), d=st.integers(8, 12), seed=st.integers(0, 2**20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_distance_is_a_metric_between_spaces_of_one_rank(r, d, seed):
    a, b, c = (subspace(random_basis(r, 3 * seed + each, d)) for each in range(3))

    def distance(one, other):
        return one.compare(other).sites[0].distance

    assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-9)
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-9
    assert 0 <= distance(a, b) <= math.sqrt(r) * math.pi / 2 + 1e-9
    assert distance(a, a) == pytest.approx(0, abs=1e-6)


def test_de_morgan():
    a, b = random_basis(14, 0), random_basis(15, 1)  # in 24 dimensions these have five in common
    outside_both = algebra.complement(algebra.union(algebra.complement(a), algebra.complement(b)))
    assert outside_both.shape[1] == 5
    common = algebra.intersection(a, b, angle=0.001)
    torch.testing.assert_close(projector(common), projector(outside_both), rtol=0, atol=1e-6)


def test_comparing_with_itself(model, subspace_of):
    one = subspace_of(model)
    found = one.compare(one)
    assert [site.site for site in found.sites] == ["layer 2 K", "layer 2 V", "layer 3 K", "layer 3 V"]
    assert (found.angle, found.distance) == pytest.approx((0, 0), abs=1e-5)
    assert (found.overlap, found.by_chance) == (pytest.approx(1), 0.5)


def test_a_comparison_says_what_the_angles_say():
    a, b = at_angles([0.0, 30.0, 60.0])
    found = subspace(a).compare(subspace(b, layers=(3, 5)))
    assert [(site.layer, site.side) for site in found.sites] == [(3, "k"), (3, "v")]  # the one that both have
    site = found.sites[0]
    assert site.angles == pytest.approx((0, 30, 60), abs=1e-4)
    assert site.distance == pytest.approx(math.hypot(math.pi / 6, math.pi / 3), abs=1e-6)
    assert site.overlap == pytest.approx((1 + 0.75 + 0.25) / 3)
    assert found.angle == pytest.approx(30, abs=1e-4)
    data = found.to_dict()
    assert data["mean"]["overlap"] == found.overlap
    assert data["sites"][1] == found.sites[1].to_dict()
    assert data["sites"][0]["ranks"] == [3, 3]


def test_what_chance_gives_between_ranks():
    overlaps = []
    for seed in range(60):
        (site, _) = (
            subspace(random_basis(3, seed), layers=[0]).compare(subspace(random_basis(9, 100 + seed), layers=[0])).sites
        )
        overlaps.append(site.overlap)
    assert site.by_chance == 9 / WIDTH
    assert sum(overlaps) / 60 == pytest.approx(9 / WIDTH, abs=0.03)


def test_combining_subspaces_site_by_site(model, subspace_of, tmp_path):
    one = subspace_of(model)
    other = random_subspace(one, 0)
    few = one.union(other.truncate(3))
    assert [few.side(side)[layer].rank for layer in few.layers for side in "kv"] == [8 + 3] * 4
    part = few.intersect(one, angle=1)
    for layer in one.layers:
        for side in "kv":
            torch.testing.assert_close(
                projector(part.side(side)[layer].basis), projector(one.side(side)[layer].basis), rtol=0, atol=1e-5
            )
    outside = few.complement()
    assert outside.k[2].rank == 16 - 11
    few.save_pretrained(tmp_path)
    loaded = spd.Subspace.from_pretrained(tmp_path, model)
    assert loaded.provenance == few.provenance
    assert (loaded.derived, loaded.sha256) == ("union", few.sha256)


def test_what_is_derived_can_be_attached(model, subspace_of, tokenizer, prompts):
    """Erasing is projecting on the complement, and the union of the two leaves the model as it is."""
    one = subspace_of(model)
    tokens = tokenizer(prompts[0], return_tensors="pt").input_ids

    def logits(subspace=None, **weights):
        with torch.no_grad():
            if subspace is None:
                return model(tokens).logits
            with spd.attach(model, subspace, **weights):
                return model(tokens).logits

    torch.testing.assert_close(logits(one, a=1.0, b=-1.0), logits(one.complement()), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(one.union(one.complement())), logits(), rtol=0, atol=1e-4)
    assert float((logits(one.complement()) - logits()).abs().max()) > 1e-2


def test_layers_that_one_alone_has():
    a, b = (random_basis(4, seed) for seed in range(2))
    one, other = subspace(a, layers=(1, 3)), subspace(b, layers=(3, 5))
    joined = one.union(other)
    assert joined.layers == [1, 3, 5]
    assert [joined.k[layer].rank for layer in joined.layers] == [4, 8, 4]
    torch.testing.assert_close(joined.k[5].basis, other.k[5].basis)
    assert one.intersect(other, angle=90).layers == [3]
    with pytest.raises(spd.InputError, match=r"other: expected a layer in common with \[1\], got \[5\]"):
        subspace(a, layers=[1]).compare(subspace(b, layers=[5]))


def test_provenance_of_what_is_derived(model, subspace_of):
    one = subspace_of(model)
    other = random_subspace(one, 0)
    made = one.intersect(other, angle=80).complement()
    assert made.provenance["config_sha256"] == one.provenance["config_sha256"]
    made.check_model(model)
    derived = made.provenance["derived"]
    assert derived["operation"] == made.derived == "complement"
    inner = derived["parents"][0]["provenance"]["derived"]
    assert (inner["operation"], inner["angle"]) == ("intersect", 80)
    assert [each["tensors_sha256"] for each in inner["parents"]] == [one.sha256, other.sha256]
    assert inner["parents"][0]["provenance"] == one.provenance


def test_the_hash_is_that_of_the_file(model, subspace_of, tmp_path):
    from spd.files import sha256_of_file

    one = subspace_of(model)
    one.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert one.sha256 == sha256_of_file(file)


def test_energy(model, tokenizer, examples):
    full = spd.calibrate(model, tokenizer, examples, rank="full", progress=False)
    squares = {key: basis.singular_values.square() for key, basis in (((2, "k"), full.k[2]), ((3, "v"), full.v[3]))}
    for key, values in squares.items():
        assert full.energy(5).sites[key] == pytest.approx(float(values[:5].sum() / values.sum()))
    assert full.energy().mean == pytest.approx(1)
    half = full.truncate("half")
    assert half.energy().sites == full.energy("half").sites
    assert half.energy(12).sites == full.energy(12).sites  # the spectrum is whole
    assert min(full.energy("energy:0.9").sites.values()) >= 0.9
    assert full.energy(5).to_dict()["sites"]["layer 2 K"] == full.energy(5).sites[2, "k"]
    with pytest.raises(spd.InputError, match="rank: expected at most d = 16, got 17"):
        full.energy(17)


def test_a_derived_subspace_claims_no_spectrum(model, subspace_of):
    made = subspace_of(model).complement()
    assert made.k[2].singular_values.tolist() == [1.0] * 8 + [0.0] * 8
    for ask in (made.energy, lambda: made.truncate("energy:0.9")):
        with pytest.raises(spd.InputError, match="not known, since it was made by complement"):
            ask()
    assert made.truncate(3).derived == "complement"
    assert subspace_of(model).derived is None


def test_what_cannot_be_combined_is_refused_by_name(model, make_model, subspace_of):
    one = subspace_of(model)
    stranger = subspace_of(make_model("qwen3", num_hidden_layers=6))
    for operation in (one.union, one.compare, lambda other: one.intersect(other, angle=5)):
        with pytest.raises(spd.InputError, match="configuration differs"):
            operation(stranger)
        with pytest.raises(spd.InputError, match="other: expected d = 16 at K of layer 3, got 24"):
            operation(subspace(random_basis(4, 0), layers=[3]))
    with pytest.raises(spd.InputError, match=r"layer 2 K, layer 3 K, which holds all d"):
        full = {layer: spd.Basis(torch.eye(16), torch.ones(16).double()) for layer in (2, 3)}
        spd.Subspace(full, one.v).complement()
    for angle in (0, 91, float("nan"), True, "5"):
        with pytest.raises(spd.InputError, match="angle: expected degrees above 0 and up to 90"):
            one.intersect(one, angle=angle)


def test_an_empty_intersection_names_its_sites():
    near, far = at_angles([3.0, 50.0]), at_angles([40.0, 50.0])
    one, other = subspace(near[0], far[0], layers=[7]), subspace(near[1], far[1], layers=[7])
    with pytest.raises(spd.InputError, match=r"within 5 degrees at layer 7 V \(40\)"):
        one.intersect(other, angle=5)
    assert one.intersect(other, angle=45).k[7].rank == 1
