"""A subspace as an artefact: whole or absent, and tied to its model."""

import json
import resource
import signal

import pytest
import torch

import spd
from spd.provenance import weights_fingerprint
from spd.record import example_hashes
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
    assert len(list((tmp_path / "s").glob("subspace-*.safetensors"))) == 1
    assert len(list((tmp_path / "s").iterdir())) == 2


def test_provenance_says_where_it_came_from(subspace, model, examples):
    assert subspace.provenance["weights"] == weights_fingerprint(model)
    assert subspace.provenance["example_sha256"] == example_hashes(examples)
    assert subspace.provenance["examples"] == len(examples)
    assert subspace.provenance["settings"]["rank"] == "half"
    assert {"model", "config_sha256", "examples_sha256", "versions", "rows"} <= set(subspace.provenance)
    json.dumps(subspace.provenance)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_file_is_refused(damage, subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
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


@pytest.mark.parametrize("missing", ["subspace.json", "*.safetensors"])
def test_half_a_folder_is_refused(missing, subspace, tmp_path):
    subspace.save_pretrained(tmp_path)
    (path,) = tmp_path.glob(missing)
    path.unlink()
    with pytest.raises(spd.InputError, match=f"{path.name}.* is missing"):
        spd.Subspace.from_pretrained(tmp_path)


def test_a_manifest_does_not_lead_out_of_its_folder(subspace, tmp_path):
    subspace.save_pretrained(tmp_path / "s")
    (path,) = (tmp_path / "s").glob("*.safetensors")
    path.rename(tmp_path / path.name)
    manifest = tmp_path / "s" / "subspace.json"
    manifest.write_text(manifest.read_text().replace(path.name, f"../{path.name}"))
    with pytest.raises(spd.InputError, match="is missing"):
        spd.Subspace.from_pretrained(tmp_path / "s")


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


@pytest.mark.parametrize("room", [0, 1000, 3000])
def test_a_full_disk_leaves_the_old_subspace(room, subspace, make_model, subspace_of, tmp_path):
    """The limit on a file's size stands in for the disk's: writing beyond it fails in the same way."""
    subspace.save_pretrained(tmp_path)
    other = subspace_of(make_model("qwen3", seed=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            other.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_old_subspace_holds_until_the_new_manifest_is_in_place(
    subspace, make_model, subspace_of, tmp_path, monkeypatch
):
    subspace.save_pretrained(tmp_path)
    other = subspace_of(make_model("qwen3", seed=1))
    monkeypatch.setattr("spd.subspace.write_json", lambda path, content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save_pretrained(tmp_path)
    assert torch.equal(spd.Subspace.from_pretrained(tmp_path).k[2].basis, subspace.k[2].basis)
    monkeypatch.undo()
    other.save_pretrained(tmp_path)
    assert torch.equal(spd.Subspace.from_pretrained(tmp_path).k[2].basis, other.k[2].basis)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_model_with_another_padding_token_is_accepted(subspace, model, tmp_path):
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    subspace.check_model(model)


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


def test_the_leading_directions_of_a_subspace(model, tokenizer, examples):
    full = spd.calibrate(model, tokenizer, examples, rank="full", progress=False)
    for rank in ("half", 3, "energy:0.9"):
        own = spd.calibrate(model, tokenizer, examples, rank=rank, progress=False)
        cut = full.truncate(rank)
        assert cut.provenance["settings"] == own.provenance["settings"]
        for side in "kv":
            for layer in own.layers:
                assert torch.equal(cut.side(side)[layer].basis, own.side(side)[layer].basis)
    with pytest.raises(spd.InputError, match=r"'full' asks for .* of which only 3 were kept"):
        full.truncate(3).truncate("full")
