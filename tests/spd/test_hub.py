"""To the hub and back: what goes up, what comes down, and what is refused. No network: the calls are recorded."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import spd
from spd.explorer.numbers import transfer
from spd.hub import fetch, is_repo_id, model_card, push_to_hub
from spd.subspace import Basis, Subspace


def made(**provenance):
    u = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    basis = Basis(u[:, :4].contiguous(), torch.logspace(0, -3, 8, dtype=torch.float64))
    settings = {"layers": "paper", "rank": "half", "loss": "spans"}
    origin = {"model": "someone/model-1", "examples": 50, "examples_sha256": "e" * 64, "settings": settings}
    return Subspace({1: basis, 3: basis}, {1: basis, 3: basis}, origin | provenance)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one folder: `repositories/user/name` is what `user/name` holds; `calls` are recorded."""

    class Hub:
        folder, calls = tmp_path / "repositories", []

        def __init__(self, token=None):
            self.calls.append(("HfApi", {"token": token}))

        def create_repo(self, repo_id, **settings):
            self.calls.append(("create_repo", settings))
            (self.folder / repo_id).mkdir(parents=True, exist_ok=settings["exist_ok"])
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, **settings):
            self.calls.append(("upload_folder", settings))
            files = huggingface_hub.utils.filter_repo_objects(
                [path.name for path in Path(folder_path).iterdir()], allow_patterns=allow_patterns
            )
            there = [path.name for path in (self.folder / repo_id).iterdir()]
            for name in huggingface_hub.utils.filter_repo_objects(there, allow_patterns=delete_patterns):
                (self.folder / repo_id / name).unlink()
            for name in files:
                shutil.copy(Path(folder_path) / name, self.folder / repo_id)

    def snapshot_download(repo_id, *, allow_patterns, **settings):
        Hub.calls.append(("snapshot_download", settings | {"allow_patterns": allow_patterns}))
        if not (Hub.folder / repo_id).is_dir():
            raise FileNotFoundError(f"404: no repository {repo_id}\nmore")
        fetched = tmp_path / "cache" / repo_id
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        every = [path.name for path in (Hub.folder / repo_id).iterdir()]
        for name in huggingface_hub.utils.filter_repo_objects(every, allow_patterns=allow_patterns):
            shutil.copy(Hub.folder / repo_id / name, fetched)
        return str(fetched)

    Hub.calls.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def test_there_and_back(hub):
    subspace = made()
    assert push_to_hub(subspace, "user/sub.space_1", private=True, token="secret") == "https://hub/user/sub.space_1"
    assert hub.calls[:2] == [("HfApi", {"token": "secret"}), ("create_repo", {"private": True, "exist_ok": True})]
    names = sorted(path.name for path in (hub.folder / "user/sub.space_1").iterdir())
    assert [re.sub(r"-\w{12}\.", "-*.", name) for name in names] == [
        "README.md",
        "spectra.png",
        "subspace-*.safetensors",
        "subspace.json",
    ]
    assert not any("secret" in path.read_text(errors="ignore") for path in (hub.folder / "user/sub.space_1").iterdir())
    folder = fetch("user/sub.space_1", "v1.0")
    assert hub.calls[-1][1]["revision"] == "v1.0"
    loaded = Subspace.from_pretrained(folder)
    assert loaded.provenance == subspace.provenance
    for side in "kv":
        for layer in (1, 3):
            assert torch.equal(loaded.side(side)[layer].basis, subspace.side(side)[layer].basis)


def test_only_the_manifest_and_safetensors_come_down(hub):
    push_to_hub(made(), "user/name")
    for foreign in ("evil.py", "model.bin", "other.json", "pytorch_model.safetensors", "subspace.json.py"):
        (hub.folder / "user/name" / foreign).write_text("raise SystemExit")
    found = [path.name for path in fetch("user/name").iterdir()]
    assert len(found) == 2 and "subspace.json" in found and any(name.endswith(".safetensors") for name in found)


def test_a_second_push_replaces_the_first(hub):
    push_to_hub(made(), "user/name")
    other = made()
    flipped = {layer: Basis(-basis.basis, basis.singular_values) for layer, basis in other.k.items()}
    push_to_hub(Subspace(flipped, other.v, other.provenance), "user/name")
    assert len(list((hub.folder / "user/name").glob("*.safetensors"))) == 1
    assert torch.equal(Subspace.from_pretrained(fetch("user/name")).k[1].basis, flipped[1].basis)


def test_a_tampered_or_foreign_repository_is_refused(hub, tmp_path):
    push_to_hub(made(), "user/name")
    (tensors,) = (hub.folder / "user/name").glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(spd.InputError, match="truncated or altered"):
        Subspace.from_pretrained(fetch("user/name"))

    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(tensors.read_bytes())
    manifest = hub.folder / "user/name/subspace.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tensors": f"../../../{outside.name}"}))
    with pytest.raises(spd.InputError, match="is missing"):
        Subspace.from_pretrained(fetch("user/name"))

    (hub.folder / "user/model").mkdir()
    (hub.folder / "user/model/config.json").write_text("{}")
    with pytest.raises(spd.InputError, match=r"user/model: no subspace, the repository has no subspace\.json"):
        fetch("user/model")
    with pytest.raises(
        spd.InputError, match=r"user/none: could not be fetched from the hub \(404: no repository"
    ) as error:
        fetch("user/none")
    assert "\n" not in str(error.value)


NO_NAMES = ("name", "a/b/c", "../b", "a/..", "./b", "a/.b", "/b", "a/", "a b/c", "a/b\n", "a/b.git", "a--b/c", "a/b..c")
NO_NAMES += ("C:\\a", "https://hub/a/b", "a/b?x", "a/" + "b" * 95, "", None, Path("a/b"), "a/%2e%2e", "ä/b")


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_none(name, hub):
    assert not is_repo_id(name)
    for use in (lambda: fetch(name), lambda: push_to_hub(made(), name)):
        with pytest.raises(spd.InputError, match='repo_id: expected "user/name"'):
            use()
    with pytest.raises(spd.InputError, match='base_model: expected "user/name"'):
        push_to_hub(made(), "user/name", base_model=name or "")
    assert not hub.calls


@pytest.mark.parametrize("name", ["user/name", "a/b", "A-1/b_2.c", "org-x/Model-7B_v1.5"])
def test_names_that_are_some(name):
    assert is_repo_id(name)
    huggingface_hub.utils.validate_repo_id(name)


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "-x", "", "a b", "/etc"])
def test_revisions_lead_nowhere(revision, hub):
    with pytest.raises(spd.InputError, match="revision: expected"):
        fetch("user/name", revision)
    assert not hub.calls


def test_no_path_of_this_machine_is_published(hub):
    push_to_hub(made(model="/home/someone/checkpoints/tuned"), "user/name")
    for path in (hub.folder / "user/name").iterdir():
        assert b"/home/someone" not in path.read_bytes()
    assert Subspace.from_pretrained(fetch("user/name")).provenance["model"] == "tuned"
    push_to_hub(made(model="/home/someone/checkpoints/tuned"), "user/name", base_model="someone/tuned")
    card = ModelCard((hub.folder / "user/name/README.md").read_text())
    assert card.data.base_model == "someone/tuned"


def test_a_derived_subspace_is_published_without_spectra(hub):
    push_to_hub(made(model="/home/someone/base"), "user/name")
    push_to_hub(made(model="/home/someone/base").complement(), "user/name")
    names = {path.name for path in (hub.folder / "user/name").iterdir()}
    assert "spectra.png" not in names, "nor is the one of the subspace that was there before"
    for path in (hub.folder / "user/name").iterdir():
        assert b"/home/someone" not in path.read_bytes()
    card = (hub.folder / "user/name/README.md").read_text()
    assert "made by complement of subspaces" in card and "| layer 3 V | 8 | 4 |" in card and "energy" not in card
    assert Subspace.from_pretrained(fetch("user/name")).derived == "complement"


def test_the_card_says_what_it_is_and_where_it_came_from():
    text = model_card(made(), "user/name", license="apache-2.0")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header == {
        "base_model": "someone/model-1",
        "library_name": "spd",
        "license": "apache-2.0",
        "tags": ["spd", "self-policy-distillation", "subspace", "arxiv:2605.22675"],
    }
    assert ModelCard(text).data.license == "apache-2.0"
    for said in (
        "e" * 64,
        "| examples | 50 |",
        "| layer 1 K | 8 | 4 |",
        "the spans that define correctness",
        "1, 3 (paper)",
    ):
        assert said in text
    assert "None was given with this upload" in text and "![Singular values" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert 'Subspace.from_pretrained("user/name", model)' in code
    assert json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1]) == made().provenance


def test_the_card_holds_the_measured_effect():
    base = {"capability": None, "arm": "base", "task": "sums", "n": 50, "accuracy": 0.4, "interval_95": [0.3, 0.5]}
    tuned = base | {"capability": "sums", "arm": "spd", "accuracy": 0.6, "interval_95": [0.5, 0.7]}
    text = model_card(made(), "user/name", metrics=transfer([base, tuned]))
    assert "| spd | sums | sums | accuracy | 60.0 [50.0, 70.0] | 50 | +20 |" in text
    assert "not stated" in text and "license" not in text.split("---\n")[1]


def test_a_provenance_cannot_break_out_of_the_card():
    hostile = "x\n---\nlicense: mit\n---\n# <img src=x onerror=1> | `a` ```\n[l](http://h)"
    subspace = made(
        model=hostile, examples_sha256=hostile, settings={"layers": hostile, "rank": hostile, "loss": hostile}
    )
    text = model_card(subspace, "user/name")
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    before_json = text.partition("```json")[0]
    assert "<img" not in before_json.replace("\\<img", "") and "[l](http" not in before_json.replace("\\[l", "")
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")
    rows = [line for line in before_json.splitlines() if line.startswith("| examples, SHA-256")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch):
    def refuse(self, *arguments, **settings):
        raise PermissionError("403: not yours\nRequest ID: 1")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(spd.InputError, match=r"^repo_id: user/name could not be pushed to the hub \(403: not yours\)$"):
        push_to_hub(made(), "user/name")
