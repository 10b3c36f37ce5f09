"""A subspace as an artefact: whole or absent, and tied to its model."""

import json

import pytest
import safetensors.torch
import torch

import spd
from spd.subspace import choose_rank


@pytest.fixture
def subspace(subspace_of, model):
    return subspace_of(model)


def test_round_trip(subspace, model, tmp_path):
    subspace.save_pretrained(tmp_path / "s")
    loaded = spd.Subspace.from_pretrained(tmp_path / "s", model)
    assert loaded.layers == subspace.layers == [2, 3]
    for layer in loaded.layers:
        for side in "kv":
            a, b = loaded.side(side)[layer], subspace.side(side)[layer]
            assert torch.equal(a.basis, b.basis)
            assert torch.equal(a.singular_values, b.singular_values)
    assert loaded.provenance == subspace.provenance
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["subspace.json", "subspace.safetensors"]


def test_provenance_says_where_it_came_from(subspace, examples):
    assert subspace.provenance["examples"] == len(examples)
    assert subspace.provenance["settings"]["rank"] == "half"
    assert {"model", "config_sha256", "examples_sha256", "versions", "rows"} <= set(subspace.provenance)
    json.dumps(subspace.provenance)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_file_is_refused(damage, subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    path = tmp_path / "subspace.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[:-7]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray()
    path.write_bytes(content)
    with pytest.raises(spd.InputError, match="truncated or altered"):
        spd.Subspace.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["subspace.json", "subspace.safetensors"])
def test_half_a_folder_is_refused(missing, subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(spd.InputError, match=missing):
        spd.Subspace.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}'])
def test_a_manifest_that_is_none_is_refused(content, subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    (tmp_path / "subspace.json").write_text(content)
    with pytest.raises(spd.InputError, match=r"subspace\.json"):
        spd.Subspace.from_pretrained(tmp_path)


def test_another_model_is_refused_with_both_names(subspace, make_model, tmp_path):
    subspace.provenance["model"] = "the-model-it-came-from"
    subspace.save_pretrained(tmp_path)
    other = make_model("qwen3", num_hidden_layers=6)
    other.config._name_or_path = "the-other-model"
    with pytest.raises(spd.InputError, match=r"the-model-it-came-from.*the-other-model"):
        spd.Subspace.from_pretrained(tmp_path, other)
    with pytest.raises(spd.InputError, match=r"the-model-it-came-from.*the-other-model"):
        spd.attach(other, subspace)


def test_the_same_model_in_another_dtype_is_accepted(subspace, model):
    subspace.check_model(model.to(torch.bfloat16))


def test_a_full_disk_leaves_the_old_subspace(subspace, tmp_path, monkeypatch):
    subspace.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        subspace.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bases_must_be_orthonormal_and_finite():
    values = torch.ones(4, dtype=torch.float64)
    good = spd.Basis(torch.eye(4)[:, :2], values)
    with pytest.raises(spd.InputError, match="orthonormal"):
        spd.Subspace({0: spd.Basis(torch.ones(4, 2), values)}, {0: good})
    with pytest.raises(spd.InputError, match="finite"):
        spd.Subspace({0: good}, {0: spd.Basis(torch.full((4, 2), float("nan")), values)})
    with pytest.raises(spd.InputError, match=r"1 <= r <= d, got \(2, 4\)"):
        spd.Subspace({0: good}, {0: spd.Basis(torch.eye(4)[:2], values)})
    with pytest.raises(spd.InputError, match="same layers"):
        spd.Subspace({0: good}, {1: good})


@pytest.mark.parametrize(("rank", "expected"), [("half", 2), (1, 1), ("energy:0.5", 1), ("energy:0.95", 3)])
def test_choosing_a_rank(rank, expected):
    # shares of the squares, summed up: 0.53, 0.80, 0.993, 1
    squares = torch.tensor([8.0, 4.0, 2.9, 0.1], dtype=torch.float64)
    assert choose_rank(rank, squares.sqrt()) == expected
