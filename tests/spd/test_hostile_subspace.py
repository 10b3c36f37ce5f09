"""Folders of subspaces, adapters and runs that someone altered: loaded as they were, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import NASTY, NASTY_TEXT, Tally, fuzzed, mutated, mutated_bytes, mutated_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import spd
from spd.explorer import explore, explore_json, read_metrics
from spd.export import export_adapter
from spd.files import sha256, write_json
from spd.hub import model_card
from spd.manifest import verify
from spd.subspace import MANIFEST, provenance_hash
from spd.tensor_file import read_header

PROVENANCE: dict[str, Any] = {
    "model": "m",
    "config_sha256": "0" * 64,
    "examples": 20,
    "examples_without_span": [3],
    "examples_sha256": "1" * 64,
    "example_sha256": ["2" * 64, "3" * 64],
    "target_tokens": 50,
    "settings": {"rank": "half", "layers": "paper", "loss": "spans"},
    "versions": {"torch": "2"},
}
METRICS = [
    {"capability": None, "arm": "base", "task": "t", "n": 4, "correct": 2, "accuracy": 0.5, "interval_95": [0.1, 0.9]},
    {"capability": "t", "arm": "spd", "task": "t", "n": 4, "correct": 3, "accuracy": 0.75, "interval_95": [0.2, 1.0]},
]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Any:
    counted = Tally(request.node.name)
    yield counted
    counted.write()


@pytest.fixture(scope="module")
def subspace() -> spd.Subspace:
    def basis(seed: int) -> spd.Basis:
        generator = torch.Generator().manual_seed(seed)
        u, s, _ = torch.linalg.svd(torch.randn(8, 8, generator=generator, dtype=torch.float64))
        return spd.Basis(u[:, :4].float().contiguous(), s)

    return spd.Subspace({1: basis(0), 3: basis(1)}, {1: basis(2), 3: basis(3)}, PROVENANCE)


@pytest.fixture
def folder(subspace: spd.Subspace, tmp_path: Path) -> Path:
    subspace.save_pretrained(tmp_path / "subspace")
    return tmp_path / "subspace"


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return manifest, (folder / manifest["tensors"]).read_bytes()


def put(folder: Path, manifest: dict[str, Any], tensors: bytes) -> None:
    """A folder whose hashes are right, so that what is hostile gets beyond them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    name = f"subspace-{sha256(tensors)[:12]}.safetensors"
    (folder / name).write_bytes(tensors)
    write_json(folder / MANIFEST, manifest | {"tensors": name, "tensors_sha256": sha256(tensors)})


def header_and_body(tensors: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", tensors[:8])
    return json.loads(tensors[8 : 8 + length]), tensors[8 + length :]


def with_header(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def used(folder: Path) -> spd.Subspace:
    """Loaded, and everything of it looked at that is shown of one."""
    loaded = spd.Subspace.from_pretrained(folder)
    loaded.truncate(1)
    loaded.complement()
    assert loaded.derived or loaded.energy().mean <= 1.0 + 1e-9
    return loaded


# Subspaces


@fuzzed
@given(data=st.data(), which=st.sampled_from(["manifest", "tensors"]))
def test_altered_files(data: st.DataObject, which: str, subspace: spd.Subspace, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "subspace"
    shutil.rmtree(folder, ignore_errors=True)
    subspace.save_pretrained(folder)
    manifest, _ = parts(folder)
    path = folder / (MANIFEST if which == "manifest" else manifest["tensors"])
    before = path.read_bytes()
    path.write_bytes(data.draw(mutated_bytes(before)))
    loaded = tally.attempt(used, folder)
    if loaded is not None:
        assert loaded.sha256 == subspace.sha256 and (path.read_bytes() == before or which == "manifest")
    tally.attempt(verify, folder)


@fuzzed
@given(data=st.data())
def test_altered_manifests_with_right_hashes(
    data: st.DataObject, subspace: spd.Subspace, tmp_path: Path, tally: Tally
) -> None:
    folder = tmp_path / "subspace"
    shutil.rmtree(folder, ignore_errors=True)
    subspace.save_pretrained(folder)
    manifest, _ = parts(folder)
    del manifest["provenance_sha256"]
    (folder / MANIFEST).write_bytes(data.draw(mutated_json(manifest)))
    loaded = tally.attempt(used, folder)
    assert loaded is None or loaded.sha256 == subspace.sha256
    tally.attempt(verify, folder)


@fuzzed
@given(data=st.data())
def test_altered_headers_with_right_hashes(
    data: st.DataObject, subspace: spd.Subspace, tmp_path: Path, tally: Tally
) -> None:
    subspace.save_pretrained(tmp_path / "subspace")
    manifest, tensors = parts(tmp_path / "subspace")
    header, body = header_and_body(tensors)
    hostile = with_header(data.draw(mutated_json(header)), body)
    if data.draw(st.booleans()):
        hostile = data.draw(mutated_bytes(tensors))
    put(tmp_path / "hostile", manifest, hostile)
    loaded = tally.attempt(used, tmp_path / "hostile")
    if loaded is not None:
        for layer in (1, 3):
            for side in "kv":
                u = loaded.side(side)[layer].basis
                assert torch.allclose(u.T.double() @ u.double(), torch.eye(u.shape[1]).double(), atol=1e-3)


def entry(shape: list[int], start: int = 0, end: int = 256, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header | {"k.1.basis": entry([10**12, 10**6])},
        lambda header: header | {"k.1.basis": entry([2**62, 2**62])},
        lambda header: header | {"k.1.basis": entry([8, 4], 0, 2**50)},
        lambda header: header | {"k.1.basis": entry([2**40, 0], 0, 0)},
        lambda header: header | {"k.1.basis": header["k.3.basis"]},
        lambda header: header | {"k.1.basis": header["k.1.basis"] | {"shape": [4, 8]}},
        lambda header: header | {"k.1.basis": header["k.1.basis"] | {"shape": [32]}},
        lambda header: header | {"k.1.basis": header["k.1.basis"] | {"dtype": "I32"}},
        lambda header: header | {"k.1.basis": header["k.1.basis"] | {"dtype": "F8_E4M3", "shape": [16, 8]}},
        lambda header: header | {"k.1.singular_values": header["k.1.singular_values"] | {"dtype": "C64"}},
        lambda header: header | {"k.1.singular_values": header["k.1.singular_values"] | {"dtype": "I64"}},
        lambda header: {name: each for name, each in header.items() if name != "v.3.basis"},
        lambda header: {("k.01.basis" if name == "k.1.basis" else name): each for name, each in header.items()},
        lambda header: {("\u202e" + name): each for name, each in header.items()},
        lambda header: {"__metadata__": {"format": "pt"}} | {"k.1.basis": header["k.1.basis"]},
    ],
)
def test_claims_of_a_header(change: Callable[..., Any], folder: Path, tally: Tally) -> None:
    """A claim is refused before anything is allocated: the tally bounds the memory of each case."""
    manifest, tensors = parts(folder)
    header, body = header_and_body(tensors)
    put(folder, manifest, with_header(json.dumps(change(header)).encode(), body))
    assert tally.attempt(used, folder) is None
    assert str(folder) in tally.said


@pytest.mark.parametrize(
    "tensors",
    [b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 99_999_999) + b"{}"],
    ids=repr,
)
def test_lengths_of_a_header(tensors: bytes, folder: Path, tally: Tally) -> None:
    put(folder, parts(folder)[0], tensors)
    assert tally.attempt(used, folder) is None


def test_a_tensor_named_twice_is_refused(folder: Path, tally: Tally) -> None:
    """safetensors itself takes the last one."""
    manifest, tensors = parts(folder)
    header, body = header_and_body(tensors)
    twice = json.dumps(header)[:-1] + ', "k.1.basis": ' + json.dumps(header["k.1.basis"] | {"shape": [4, 8]}) + "}"
    put(folder, manifest, with_header(twice.encode(), body))
    assert tally.attempt(used, folder) is None
    assert "two of 'k.1.basis'" in tally.said


@pytest.mark.parametrize(
    "values",
    [
        lambda s: -s,
        lambda s: 0 * s,
        lambda s: s * float("nan"),
        lambda s: s * float("inf"),
        lambda s: s * 1e300,
        lambda s: s * 1e-300,
    ],
)
def test_spectra_that_are_none(values: Callable[..., Any], subspace: spd.Subspace, folder: Path, tally: Tally) -> None:
    manifest, _ = parts(folder)
    tensors = {
        f"{side}.{layer}.{name}": (getattr(basis, name) if name == "basis" else values(basis.singular_values))
        for side in "kv"
        for layer, basis in subspace.side(side).items()
        for name in ("basis", "singular_values")
    }
    put(folder, manifest, save({name: each.contiguous() for name, each in tensors.items()}))
    assert tally.attempt(used, folder) is None


@pytest.mark.parametrize(
    "layers",
    [None, "13", {}, [], [1], [1, 3, 5], [1.0, 3.0], [True, 3], ["1", "3"], [-1, 3], [10**400], [[1]], [1, 1, 3]],
)
def test_layers_of_a_manifest(layers: Any, folder: Path, tally: Tally) -> None:
    manifest, tensors = parts(folder)
    put(folder, manifest | {"layers": layers}, tensors)
    loaded = tally.attempt(used, folder)
    assert loaded is None or (loaded.layers == [1, 3] and layers == [1, 1, 3])


@pytest.mark.parametrize("name", NASTY, ids=lambda name: repr(name)[:16])
def test_a_manifest_names_a_file_of_its_own_folder(name: Any, folder: Path, tally: Tally) -> None:
    manifest, tensors = parts(folder)
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(tensors)
    if not isinstance(name, float):
        for each in (name, f"../{name}", "../outside.safetensors", str(outside)):
            write_json(folder / MANIFEST, manifest | {"tensors": each})
            assert tally.attempt(used, folder) is None


def test_links_are_followed_to_read_and_never_to_write(subspace: spd.Subspace, folder: Path, tally: Tally) -> None:
    """The hub's cache is made of links, and the hashes say what is read. A link is replaced, its target left alone."""
    manifest, _ = parts(folder)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    for name in (MANIFEST, manifest["tensors"]):
        (folder / name).rename(elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    assert tally.attempt(used, folder).sha256 == subspace.sha256
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    subspace.truncate(2).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert used(folder).k[1].rank == 2
    assert not any(path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
@pytest.mark.parametrize("which", ["manifest", "tensors"])
def test_what_is_no_file(kind: str, which: str, folder: Path, tally: Tally) -> None:
    manifest, _ = parts(folder)
    path = folder / (MANIFEST if which == "manifest" else manifest["tensors"])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    assert tally.attempt(used, folder) is None
    tally.attempt(verify, folder)


@fuzzed
@given(provenance=mutated(PROVENANCE))
def test_any_provenance_can_be_shown(
    provenance: Any, subspace: spd.Subspace, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    """What is recorded can be anything: the page, the numbers and the card say it, or refuse it."""
    if not isinstance(provenance, dict):
        return
    try:
        json.dumps(provenance, ensure_ascii=False).encode()
    except ValueError:  # no file can say it
        return
    made = spd.Subspace(subspace.k, subspace.v, provenance)
    assert tally.attempt(provenance_hash, provenance)
    if tally.tried < 12:  # a page takes a second
        assert "<html" in tally.attempt(explore, {"a": made})
    assert tally.attempt(explore_json, {"a": made})
    assert "# n" in tally.attempt(model_card, made, "u/n")


@fuzzed
@given(content=mutated_json(METRICS))
def test_metrics(content: bytes, tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "metrics.json").write_bytes(content)
    tally.attempt(read_metrics, tmp_path)


# Runs


@pytest.fixture(scope="module")
def run(subspace: spd.Subspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with something of every kind in it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subspace.save_pretrained(out / "t" / "subspace")
    write_json(out / "config.json", {})
    write_json(out / "metrics.json", METRICS)
    generation = {"index": 0, "prompt": "p", "completion": "c", "tokens": [1, 2], "finished": True}
    lines = "".join(json.dumps(generation | {"index": index}) + "\n" for index in range(4))
    settings = {"prompts": 4, "prompts_sha256": sha256(json.dumps(["p"] * 4)), "tag": f"subspace {'0' * 64}"}
    scored = {"prompt": "p", "reference": "r", "completion": "c", "correct": True}
    for name in ("base/evaluations/t", "t/evaluations/spd/t", "t/generations/projected"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.jsonl").write_text(lines)
        write_json(out / f"{name}.settings.json", settings)
        if "evaluations" in name:
            (out / f"{name}.scored.jsonl").write_text((json.dumps(scored) + "\n") * 4)
    adapter = out / "t" / "adapters" / "projected"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(
        save(
            {"base_model.model.q.lora_A.weight": torch.ones(2, 8), "base_model.model.q.lora_B.weight": torch.ones(8, 2)}
        )
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "base_model_name_or_path": "m"}
    write_json(adapter / "adapter_config.json", config)
    recipe = {"lora_rank": 2, "lora_alpha": 2}
    manifest = {"recipe": recipe, "data_sha256": "0" * 64, "loss": [{"step": 1, "loss": 1.0}], "examples": 4}
    write_json(adapter / "training.json", manifest | {"weights_sha256": "0" * 64, "config_sha256": "1" * 64})
    return out


@fuzzed
@given(data=st.data())
def test_verify_tells_of_any_run(
    data: st.DataObject, run: Path, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    """It looks at everything: a file that is altered is reported or the folder refused, whatever is in it."""
    out = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(run, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    if path.suffix == ".safetensors" or data.draw(st.integers(0, 4)) == 0:
        path.write_bytes(data.draw(mutated_bytes(content)))
    elif path.suffix == ".jsonl":
        first, _, rest = content.partition(b"\n")
        path.write_bytes(data.draw(mutated_json(json.loads(first))) + b"\n" + rest)
    else:
        path.write_bytes(data.draw(mutated_json(json.loads(content))))
    report = tally.attempt(verify, out)
    if report is not None:
        assert tally.attempt(report.text)
        assert json.dumps(report.to_dict())


@fuzzed
@given(data=st.data(), which=st.sampled_from(["adapter_config.json", "training.json", "adapter_model.safetensors"]))
def test_exporting_an_adapter(
    data: st.DataObject, which: str, run: Path, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    adapter = tmp_path_factory.mktemp("adapter") / "a"
    shutil.copytree(run / "t" / "adapters" / "projected", adapter)
    digest = sha256((adapter / "adapter_model.safetensors").read_bytes())
    manifest = json.loads((adapter / "training.json").read_text()) | {"weights_sha256": digest}
    write_json(adapter / "training.json", manifest)
    content = (adapter / which).read_bytes()
    changed = mutated_bytes(content) if which.endswith("safetensors") else mutated_json(json.loads(content))
    (adapter / which).write_bytes(data.draw(changed))
    tally.attempt(export_adapter, adapter, adapter.parent / "out")


@pytest.mark.parametrize("name", [text for text in NASTY_TEXT if text], ids=lambda text: repr(text[:16]))
def test_names_of_folders(name: str, tmp_path: Path, tally: Tally) -> None:
    for load in (spd.Subspace.from_pretrained, verify, read_metrics, lambda path: read_header(Path(path))):
        for path in (name, tmp_path / name, f"{tmp_path}/{name}/x"):
            if not os.path.isdir(path):
                assert tally.attempt(load, path) is None
