"""Files of completions and folders of adapters that someone altered: used as they were, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import NASTY_TEXT, Tally, fuzzed, mutated_bytes, mutated_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import spd
from spd.adapters import MANIFEST, WEIGHTS, adapted
from spd.completions import CHECKSUM, CompletionsFile, Generation, read_generations
from spd.files import sha256_of_file, write_json

PROMPTS = ["one", "two", "three"]
SETTINGS = {"model": "m", "prompts": 3, "seed": 1, "tag": ""}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    counted = Tally(request.node.name)
    yield counted
    counted.write()


def line(index: int) -> dict[str, Any]:
    return {"index": index, "prompt": PROMPTS[index], "completion": " 5", "tokens": [3, 4], "finished": True}


def written(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / "out.settings.json", SETTINGS)
    (folder / "out.jsonl").write_text("".join(json.dumps(line(index)) + "\n" for index in range(3)))
    return folder / "out.jsonl"


def resumed(path: Path) -> dict[int, Any]:
    with CompletionsFile(path, SETTINGS, PROMPTS) as file:
        return dict(file.done)


@fuzzed
@given(data=st.data(), which=st.sampled_from(["lines", "line", "settings"]))
def test_completions(data: st.DataObject, which: str, tmp_path: Path, tally: Tally) -> None:
    path = written(tmp_path / "out")
    if which == "lines":
        path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    elif which == "line":
        path.write_bytes(path.read_bytes() + data.draw(mutated_json(line(1))) + b"\n")
    else:
        path.with_suffix(".settings.json").write_bytes(data.draw(mutated_json(SETTINGS)))
    before = path.read_bytes()
    found = tally.attempt(read_generations, path)
    if found is not None:
        assert [each.index for each in found] == list(range(len(found)))
        assert all(isinstance(each.prompt, str) and isinstance(each.completion, str) for each in found)
    done = tally.attempt(resumed, path)
    if done is None:
        assert path.read_bytes() == before, "what is refused is left alone"
    else:
        assert all(PROMPTS[index] == each.prompt for index, each in done.items())


ALTERED = {"index": 2, "prompt": "three", "completion": " 6", "tokens": [3, 5], "finished": False, CHECKSUM: "00000000"}


@pytest.mark.parametrize("field", ALTERED)
def test_a_line_that_was_altered(field: str, tmp_path: Path, tally: Tally) -> None:
    """Each value but the checksum is one that a completion may have."""
    path = tmp_path / "out.jsonl"
    with CompletionsFile(path, SETTINGS, PROMPTS) as file:
        file.append([Generation(**line(index)) for index in range(3)])
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[1])
    assert record.keys() == ALTERED.keys() and record[field] != ALTERED[field]
    altered = json.dumps(record | {field: ALTERED[field]}) + "\n"
    path.write_text(lines[0] + altered + lines[2])
    for read in (read_generations, resumed):
        assert tally.attempt(read, path) is None
    path.write_text(altered)
    if field in ("index", "prompt"):  # alone it is neither there twice nor out of place
        assert tally.attempt(read_generations, path) is None and CHECKSUM in tally.said
    del record[CHECKSUM]
    path.write_text(lines[0] + json.dumps(record) + "\n" + lines[2])
    for read in (read_generations, resumed):
        assert len(tally.attempt(read, path)) == 3, "text from elsewhere has none"


@pytest.mark.parametrize("which", ["out.jsonl", "out.settings.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "deep", "link"])
def test_what_lies_in_the_place_of_completions(which: str, kind: str, tmp_path: Path, tally: Tally) -> None:
    path = written(tmp_path / "out").with_name(which)
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "deep":
        path.write_text("[" * 100_000 + "\n")
    else:
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    for read in (read_generations, resumed):
        found = tally.attempt(read, path.with_name("out.jsonl"))
        assert (found is not None) == (kind == "link"), tally.said


@pytest.mark.parametrize("name", [text for text in NASTY_TEXT if text], ids=lambda text: repr(text[:16]))
def test_names_of_completions(name: str, tmp_path: Path, tally: Tally) -> None:
    for path in (name, tmp_path / name, f"{tmp_path}/{name}/x.jsonl"):
        assert tally.attempt(read_generations, path) is None


@pytest.fixture(scope="module")
def trained(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PreTrainedModel, Path]:
    model = make_model("qwen3")
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    texts = spd.generate(model, tokenizer, PROMPTS, max_new_tokens=3, progress=False)
    spd.distill(model, tokenizer, texts, out=out, recipe=spd.Recipe(epochs=1, warmup_epochs=0), progress=False)
    return model, out


def opened(model: PreTrainedModel, adapter: Path) -> bool:
    with adapted(model, adapter):
        return True


@fuzzed
@given(data=st.data(), which=st.sampled_from([MANIFEST, WEIGHTS, "adapter_config.json"]))
def test_altered_adapters(
    data: st.DataObject,
    which: str,
    trained: tuple[PreTrainedModel, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tally: Tally,
) -> None:
    model, adapter = trained
    copy = tmp_path_factory.mktemp("copy") / "adapter"
    shutil.copytree(adapter, copy)
    content = (copy / which).read_bytes()
    (copy / which).write_bytes(data.draw(mutated_bytes(content)))
    tally.attempt(opened, model, copy)
    assert not hasattr(model, "peft_config")


@fuzzed
@given(data=st.data(), which=st.sampled_from([MANIFEST, WEIGHTS, "adapter_config.json"]))
def test_altered_adapters_with_right_hashes(
    data: st.DataObject,
    which: str,
    trained: tuple[PreTrainedModel, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tally: Tally,
) -> None:
    """Whoever writes the folder writes its hashes too; a rank or a shape that is claimed is not allocated."""
    model, adapter = trained
    copy = tmp_path_factory.mktemp("copy") / "adapter"
    shutil.copytree(adapter, copy)
    if which == WEIGHTS:
        tensors = load_file(copy / which)
        name = data.draw(st.sampled_from(sorted(tensors)))
        change = data.draw(st.sampled_from(["drop", "rename", "transpose", "flat", "half", "nan", "ints"]))
        tensor = tensors.pop(name)
        changes: dict[str, Any] = {"transpose": tensor.T.contiguous(), "flat": tensor.flatten(), "half": tensor.half()}
        changes |= {"nan": tensor * float("nan"), "ints": tensor.long(), "rename": tensor}
        if change != "drop":
            tensors[f"x.{name}" if change == "rename" else name] = changes[change]
        (copy / which).write_bytes(save(tensors))
    else:
        (copy / which).write_bytes(data.draw(mutated_json(json.loads((copy / which).read_text()))))
    if which != MANIFEST:
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest.pop("manifest_sha256", None)
        files = {name: sha256_of_file(copy / name) for name in (WEIGHTS, "adapter_config.json")}
        write_json(copy / MANIFEST, manifest | {"weights_sha256": files[WEIGHTS], "files_sha256": files})
    tally.attempt(opened, model, copy)
    assert not hasattr(model, "peft_config")
    assert not [name for name, _ in model.named_modules() if "lora" in name]


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff", "", " ", "\0", "\u202e", "a" * 100_000])
def test_prompts(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tally: Tally) -> None:
    """What a caller passes, rather than a file: halves of characters no tokenizer takes, and none is asked to."""
    found = tally.attempt(spd.generate, model, tokenizer, ["a", text], max_new_tokens=2, progress=False)
    assert found is None or [each.prompt for each in found] == ["a", text]
    example = tally.attempt(spd.Example, text, "b", [(len(text), len(text) + 1)])
    if example is not None:
        tally.attempt(spd.calibrate, model, tokenizer, [example], progress=False)
