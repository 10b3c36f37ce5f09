"""Exported checkpoints: what changes, what stays byte for byte, and that the result is the projected model."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import spd
from spd.export import export_adapter, export_folded, export_merged
from spd.export.checkpoint import RECORD, open_checkpoint
from spd.export.shards import FLOATS, read_shard
from spd.provenance import weights_fingerprint
from spd.subspace import Basis

CASES = {
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
}
FUSED = {"phi3": "qkv_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value"}


def saved(model, tokenizer, folder, shards=True):
    model.save_pretrained(folder, max_shard_size="30KB" if shards else "1GB")
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model, tokenizer):
    tokens = tokenizer(["Question: how many apples are 5 and 6?\nAnswer: 11"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(tokens).logits


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def layout(folder):
    """Of every shard: the header's own bytes, in which are names, order, dtypes, shapes, offsets and metadata."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        found[path.name] = content[: 8 + int.from_bytes(content[:8], "little")]
    return found


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, make_model, tokenizer, subspace_of):
    """`calibrated(case)`: a model, its checkpoint in at least two files, and a subspace."""
    made = {}

    def make(case):
        if case not in made:
            family, changes = CASES[case]
            model = make_model(family, **changes)
            folder = saved(model, tokenizer, tmp_path_factory.mktemp("base") / "checkpoint")
            assert len(list(folder.glob("*.safetensors"))) >= 2
            made[case] = model, folder, subspace_of(model)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_folded_folder_is_the_projected_model(case, calibrated, tokenizer, tmp_path):
    model, base, subspace = calibrated(case)
    before = {path.name: sha256(path) for path in base.iterdir()}
    out = export_folded(base, subspace, tmp_path / "folded")
    with spd.attach(model, subspace, mode="hook"):
        expected = logits(model, tokenizer)
    torch.testing.assert_close(logits(load(out), tokenizer), expected, rtol=0, atol=2e-5)
    assert float((expected - logits(model, tokenizer)).abs().max()) > 1e-2, "the projection does something"

    assert layout(out) == layout(base)
    own = FUSED.get(CASES[case][0])
    parts = (own,) if own else ("k_proj", "v_proj")
    middle = {"gpt2": "attn", "gpt_neox": "attention"}.get(CASES[case][0], "self_attn")
    kinds = ("weight", "bias") if any(f"{parts[0]}.bias" in name for name in tensors(base)) else ("weight",)
    old, new = tensors(base), tensors(out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {
        name
        for name in old
        for part in parts
        for kind in kinds
        if name.endswith((f".2.{middle}.{part}.{kind}", f".3.{middle}.{part}.{kind}"))
    }
    assert {path.name for path in out.iterdir()} == {*before, RECORD}
    same = {name for name, digest in before.items() if sha256(out / name) == digest}
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(before) - same == {index[name] for name in changed}
    assert {path.name: sha256(path) for path in base.iterdir()} == before


@pytest.mark.parametrize("sides", ["k", "v"])
@pytest.mark.parametrize("case", FUSED)
def test_a_changed_part_of_a_fused_layer_is_another_fingerprint(case, sides, calibrated, tmp_path):
    """What tells one model's completions from another's sees K and V as well as the Q that such a layer begins with."""
    model, base, subspace = calibrated(case)
    out = export_folded(base, subspace, tmp_path / "folded", sides=sides)
    assert weights_fingerprint(load(base)) == weights_fingerprint(model)
    assert weights_fingerprint(load(out)) != weights_fingerprint(model)
    assert open_checkpoint(out).fingerprint() != open_checkpoint(base).fingerprint()


def test_the_record_says_what_it_came_from(calibrated, tmp_path):
    _, base, subspace = calibrated("qwen3")
    out = export_folded(base, subspace, tmp_path / "folded", sides="v", a=1.0, b=-1.0)
    record = json.loads((out / RECORD).read_text())
    assert (record["kind"], record["sides"], record["a"], record["b"]) == ("folded", "v", 1.0, -1.0)
    assert record["changed"] == [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (2, 3)]
    assert record["subspace_sha256"] == subspace.sha256
    for name, hashes in record["files"].items():
        assert hashes == {"base_sha256": sha256(base / name), "sha256": sha256(out / name)}
    again = export_folded(out, subspace, tmp_path / "twice", sides="k")
    assert json.loads((again / RECORD).read_text())["base_export"]["sides"] == "v"


@pytest.mark.parametrize(("a", "b"), [(1.0, -1.0), (0.5, 0.5)])
@pytest.mark.parametrize("sides", ["k", "v"])
def test_erasing_blending_and_one_side(a, b, sides, calibrated, tokenizer, tmp_path):
    model, base, subspace = calibrated("phi3")
    out = export_folded(base, subspace, tmp_path / "folded", sides=sides, a=a, b=b)
    with spd.attach(model, subspace, mode="hook", sides=sides, a=a, b=b):
        torch.testing.assert_close(logits(load(out), tokenizer), logits(model, tokenizer), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, make_model, tokenizer, subspace_of, tmp_path):
    model = make_model("qwen2")
    subspace = subspace_of(model)
    base = saved(model.to(dtype), tokenizer, tmp_path / "base")
    out = export_folded(base, subspace, tmp_path / "folded")
    old, new = tensors(base), tensors(out)
    for side in "kv":
        for layer in subspace.layers:
            u = subspace.side(side)[layer].basis.double()
            for kind in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.{side}_proj.{kind}"
                assert torch.equal(new[name], (u @ (u.T @ old[name].double())).to(dtype))
    assert {each.dtype for each in new.values()} == {dtype}


def test_one_file_without_an_index(make_model, tokenizer, subspace_of, tmp_path):
    model = make_model("qwen3")
    subspace = subspace_of(model)
    base = saved(model, tokenizer, tmp_path / "base", shards=False)
    out = export_folded(base, subspace, tmp_path / "folded")
    with spd.attach(model, subspace, mode="hook"):
        torch.testing.assert_close(logits(load(out), tokenizer), logits(model, tokenizer), rtol=0, atol=2e-5)


def test_gpt2s_own_names(make_model, tokenizer, subspace_of, tmp_path):
    """Its published checkpoint has h.0 for transformer.h.0, and masks that the model no longer has."""
    model = make_model("gpt2")
    subspace = subspace_of(model)
    base = saved(model, tokenizer, tmp_path / "base", shards=False)
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors(base).items()}
    save_file(renamed | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, base / "model.safetensors", {"format": "pt"})
    out = export_folded(base, subspace, tmp_path / "folded")
    assert layout(out) == layout(base)
    with spd.attach(model, subspace, mode="hook"):
        torch.testing.assert_close(logits(load(out), tokenizer), logits(model, tokenizer), rtol=0, atol=2e-5)


def test_a_picture_tower_of_the_same_widths_stays(tokenizer, tmp_path):
    """It has k_proj at the same layers, and the checkpoint begins the decoder's names otherwise than the model."""
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = widths | {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": len(tokenizer), "sliding_window": 64}
    tower = widths | {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    base = saved(Gemma3ForConditionalGeneration(config), tokenizer, tmp_path / "base")
    names = [name for name in tensors(base) if name.endswith("layers.3.self_attn.k_proj.weight")]
    assert len(names) == 2 and "language_model.model.layers.3.self_attn.k_proj.weight" in names

    bases = {side: Basis(torch.linalg.qr(torch.randn(32, 8))[0], torch.ones(32).double()) for side in "kv"}
    subspace = spd.Subspace({3: bases["k"]}, {3: bases["v"]})
    out = export_folded(base, subspace, tmp_path / "folded")
    expected = [f"language_model.model.layers.3.self_attn.{side}_proj.weight" for side in "kv"]
    assert json.loads((out / RECORD).read_text())["changed"] == expected
    model = load(base)
    with spd.attach(model, subspace, mode="hook"):
        torch.testing.assert_close(logits(load(out), tokenizer), logits(model, tokenizer), rtol=0, atol=2e-5)


def test_two_beginnings_that_fit_are_refused(calibrated, tmp_path):
    _, base, subspace = calibrated("qwen3")
    twice = tmp_path / "twice"
    shutil.copytree(base, twice)
    (twice / "model.safetensors.index.json").unlink()
    for path in twice.glob("*.safetensors"):
        path.unlink()
    layers = {name.removeprefix("model."): tensor for name, tensor in tensors(base).items() if ".layers." in name}
    save_file(
        {f"{start}{name}": t.clone() for name, t in layers.items() for start in ("a.", "b.")},
        twice / "model.safetensors",
    )
    with pytest.raises(spd.InputError, match=r"a\.layers.*b\.layers"):
        export_folded(twice, subspace, tmp_path / "folded")


def test_other_files_go_along_but_no_other_copy_of_the_weights(calibrated, tmp_path):
    _, base, subspace = calibrated("llama")
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    (folder / "link.txt").symlink_to(folder / "extra" / "notes.txt")
    (folder / "consolidated.safetensors").write_bytes(b"the weights once more")
    (folder / "pytorch_model.bin").write_bytes(b"and again")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    out = export_folded(folder, subspace, tmp_path / "folded")
    assert (out / "extra" / "notes.txt").read_text() == (out / "link.txt").read_text() == "kept"
    assert json.loads((out / RECORD).read_text())["left_out"] == ["consolidated.safetensors", "pytorch_model.bin"]
    assert not any((out / name).exists() for name in ("consolidated.safetensors", "pytorch_model.bin", ".cache"))


@pytest.fixture
def copy(calibrated, tmp_path):
    """A checkpoint to damage, and its subspace."""
    _, base, subspace = calibrated("qwen2, tied")
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy", subspace


def refused(folder, subspace, out, match):
    with pytest.raises(spd.InputError, match=match):
        export_folded(folder, subspace, out)
    assert not out.exists() and not list(out.parent.glob(".*.tmp"))


def test_quantised_checkpoints_are_refused(copy, tmp_path):
    folder, subspace = copy
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(changed))
    refused(folder, subspace, tmp_path / "out", r"quantised \(quantization_config, gptq\)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused_by_name(dtype, copy, tmp_path):
    folder, subspace = copy
    name = "model.layers.3.self_attn.k_proj.weight"
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    content = load_file(path)
    save_file(content | {name: content[name].to(dtype)}, path)
    assert read_shard(path).tensors[name].dtype not in FLOATS
    refused(folder, subspace, tmp_path / "out", rf"{name} is .*quantised")


def test_torn_shards_are_refused(copy, tmp_path):
    folder, subspace = copy
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    unknown = content[:8] + content[8 : 8 + length].replace(b'"F32"', b'"Q32"') + content[8 + length :]
    for torn in (content[:-1], content + b"x", content[:100], b"", b"\xff" * 64, unknown):
        path.write_bytes(torn)
        refused(folder, subspace, tmp_path / "out", "not a whole safetensors file")


def test_pickled_and_missing_weights_are_refused(copy, tmp_path):
    folder, subspace = copy
    lost = sorted(folder.glob("*.safetensors"))[0]
    lost.unlink()
    refused(folder, subspace, tmp_path / "out", f"lacks {lost.name}")
    (folder / "pytorch_model.bin").touch()
    refused(folder, subspace, tmp_path / "out", "save_pretrained it once")


def test_two_sets_of_weights_are_refused(copy, tmp_path):
    folder, subspace = copy
    save_file(tensors(folder), folder / "model.safetensors")
    refused(folder, subspace, tmp_path / "out", "keep one")


def test_an_index_that_is_not_the_shards_is_refused(copy, tmp_path):
    folder, subspace = copy
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.more.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    refused(folder, subspace, tmp_path / "out", r"holds no model\.more\.weight")


def test_foreign_and_tampered_subspaces_are_refused(copy, calibrated, tmp_path):
    folder, subspace = copy
    refused(folder, calibrated("llama")[2], tmp_path / "out", "configuration differs")
    subspace.save_pretrained(tmp_path / "subspace")
    assert export_folded(folder, tmp_path / "subspace", tmp_path / "fine").is_dir()
    path = next((tmp_path / "subspace").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(folder, tmp_path / "subspace", tmp_path / "out", "truncated or altered")
    wider = replace(calibrated("phi3")[2], provenance={})
    refused(calibrated("gpt2")[1], wider, tmp_path / "out", "d = ")


def test_bad_arguments_are_refused(copy, tmp_path):
    folder, subspace = copy
    with pytest.raises(spd.InputError, match="sides"):
        export_folded(folder, subspace, tmp_path / "out", sides="q")
    with pytest.raises(spd.InputError, match="finite"):
        export_folded(folder, subspace, tmp_path / "out", a=float("nan"))
    with pytest.raises(spd.InputError, match="already exists"):
        export_folded(folder, subspace, folder.parent)
    with pytest.raises(spd.InputError, match="own folder"):
        export_folded(folder, subspace, folder / "folded")
    with pytest.raises(spd.InputError, match="not finite any more, in F32"):
        export_folded(folder, subspace, tmp_path / "out", a=1e300)
    assert not (tmp_path / "out").exists()


def test_hub_names_are_fetched(copy, tmp_path, monkeypatch):
    import huggingface_hub

    folder, subspace = copy
    asked = []

    def fetch(name, **settings):
        asked.append(name)
        if name != "some/model":
            raise OSError("no such repository")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    out = export_folded("some/model", subspace, tmp_path / "folded")
    assert asked == ["some/model"] and json.loads((out / RECORD).read_text())["model"] == "some/model"
    refused("other/model", subspace, tmp_path / "out", "other/model is no folder.*no such repository")


def test_a_kill_leaves_nothing_under_the_final_name(copy, tmp_path):
    """Killed while the last shard is written: what is left has another name, and the next export succeeds."""
    folder, subspace = copy
    subspace.save_pretrained(tmp_path / "subspace")
    code = """
import os, signal, sys
from spd.export import checkpoint, export_folded
real = checkpoint.rewrite
written = []
def rewrite(shard, out, changes):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(out)
    return real(shard, out, changes)
checkpoint.rewrite = rewrite
export_folded(*sys.argv[1:])
"""
    arguments = [str(folder), str(tmp_path / "subspace"), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert load(export_folded(*arguments)) is not None


def test_what_is_written_is_read_back(copy, tmp_path, monkeypatch):
    """A disk that gives other bytes back than it took, in a tensor that does not change."""
    from spd.export import shards

    folder, subspace = copy
    real = shards._chunks

    def forgetful(file, end):
        for chunk in real(file, end):
            yield bytes(len(chunk)) if ".tmp" in str(file.name) else chunk

    monkeypatch.setattr(shards, "_chunks", forgetful)
    with pytest.raises(OSError, match="read back differs"):
        export_folded(folder, subspace, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_metadata_of_a_header_is_kept(calibrated, tmp_path):
    _, base, subspace = calibrated("gemma3")
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt", "made": "by hand"})
    out = export_folded(folder, subspace, tmp_path / "folded")
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "by hand"}


@pytest.fixture(scope="module")
def trained(calibrated, tokenizer, tmp_path_factory):
    """`trained(case)`: a checkpoint's folder and an adapter whose effect is seen."""
    made = {}

    def make(case):
        if case not in made:
            _, base, _ = calibrated(case)
            model = load(base)
            texts = [spd.Generation(i, f"Question: {i}?", f" it is {i}", [], True) for i in range(4)]
            recipe = spd.Recipe(learning_rate=0.05, epochs=2, warmup_epochs=0, lora_rank=4, lora_alpha=6)
            out = tmp_path_factory.mktemp("adapter") / "adapter"
            made[case] = base, spd.distill(model, tokenizer, texts, out=out, recipe=recipe, progress=False)
        return made[case]

    return make


@pytest.mark.parametrize("case", ["qwen2, tied", "llama, biases", "gemma3", "phi3", "gpt2"])
def test_a_merged_folder_is_the_adapted_model(case, trained, tokenizer, tmp_path):
    base, adapter = trained(case)
    out = export_merged(base, adapter, tmp_path / "merged")
    model = load(base)
    with spd.adapted(model, adapter) as tuned:
        expected = logits(tuned, tokenizer)
    assert float((expected - logits(model, tokenizer)).abs().max()) > 1e-2, "the adapter does something"
    torch.testing.assert_close(logits(load(out), tokenizer), expected, rtol=1e-5, atol=2e-5)
    assert layout(out) == layout(base)
    old, new = tensors(base), tensors(out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == set(json.loads((out / RECORD).read_text())["changed"])
    assert changed and all(name.endswith(".weight") and ("attn" in name) for name in changed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_rslora": True}, "use_rslora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "kind LORA.*IA3"),
        ({"r": 0}, "rank r"),
    ],
)
def test_other_adapters_are_refused_by_name(change, match, trained, tmp_path):
    base, adapter = trained("qwen2, tied")
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    for export in (
        lambda: export_merged(base, folder, tmp_path / "out"),
        lambda: export_adapter(folder, tmp_path / "out"),
    ):
        with pytest.raises(spd.InputError, match=match):
            export()
    assert not (tmp_path / "out").exists()


def test_foreign_and_damaged_adapters_are_refused(trained, tmp_path):
    base, adapter = trained("qwen2, tied")
    with pytest.raises(spd.InputError, match="another model"):
        export_merged(trained("gpt2")[0], adapter, tmp_path / "out")
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "training.json").unlink()  # as peft writes it
    with pytest.raises(spd.InputError, match=r"which .* does not have"):
        export_merged(trained("gpt2")[0], folder, tmp_path / "out")
    assert export_merged(base, folder, tmp_path / "fine").is_dir()
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {"base_model.model.lm_head.magnitude": torch.ones(1)}, path)
    with pytest.raises(spd.InputError, match=r"not base_model\.model\.lm_head\.magnitude"):
        export_merged(base, folder, tmp_path / "out")
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, path)
    with pytest.raises(spd.InputError, match=r"but .* has B"):
        export_merged(base, folder, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(spd.InputError, match="not a whole"):
        export_merged(base, folder, tmp_path / "out")
    shutil.copy(adapter / "training.json", folder)
    with pytest.raises(spd.InputError, match="truncated or altered"):
        export_adapter(folder, tmp_path / "out")


def test_an_exported_adapter_is_one_of_peft(trained, tokenizer, tmp_path):
    from peft import PeftModel

    base, adapter = trained("llama, biases")
    out = export_adapter(adapter, tmp_path / "plain", base="some/model")
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    assert sha256(out / "adapter_model.safetensors") == sha256(adapter / "adapter_model.safetensors")
    found = logits(PeftModel.from_pretrained(load(base), str(out)).eval(), tokenizer)
    with spd.adapted(load(base), adapter) as tuned:
        assert torch.equal(found, logits(tuned, tokenizer))
    same = export_adapter(adapter, tmp_path / "same")
    assert sha256(same / "adapter_config.json") == sha256(adapter / "adapter_config.json")
