"""The planner: what the arithmetic says for given constants, what is refused, and constants that are kept."""

import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import spd
from spd.cli import main
from spd.intervention import machine as machines
from spd.intervention.machine import Amount, Curve, Machine, Rates
from spd.intervention.planner import TIE, Cost, Layer, Shape, cache_bytes, plan, predict, shape_of, step_cost
from spd.sites import find_sites
from spd_kernels.roofline import H200

# A made-up CPU: 10 GB/s, 30 GFLOP/s, tens of microseconds to call things.
CPU = Machine(
    name="made up",
    dtype="float32",
    measured=True,
    overlaps=False,
    linear=Curve((1.0, 16.0, 256.0), (1e-10, 2e-10, 2e-9)),
    append=Curve((2.0**15, 2.0**24, 2.0**26), (6e-5, 2e-3, 3e-2)),
    attention={
        "dense": Rates(1e-10, 4e-11, 0.0),
        "latent_v": Rates(7e-11, 3e-11, 1e-10),
        "latent": Rates(7e-11, 2e-11, 3e-9),
    },
    step=1e-3,
    layer={"fold": 3e-4, "hook": 4e-4, "latent_v": 5e-4, "latent": 9e-4},
)
FREE = Rates(0.0, 0.0, 0.0)
CONTEXTS = (64, 256, 1024, 4096, 16384, 65536)


def shape(rank=64, layers=4, attached=4, window=None, **changes):
    dense = Layer(32, 8, 128, window=window)
    each = [replace(dense, rank_k=rank, rank_v=rank)] * attached + [dense] * (layers - attached)
    return replace(Shape(tuple(each), layers, 10**8, 9 * 10**7, 10**7, 4), **changes)


def ranking(*arguments, **settings):
    return {each.mode: each for each in predict(*arguments, **settings)}


def modes(*arguments, **settings):
    return [each.mode for each in predict(*arguments, **settings)]


# The cost model.


def test_a_longer_context_favours_latent_v_over_fold():
    found = [ranking(shape(512), CPU, context, 1) for context in CONTEXTS]
    gains = [each["fold"].seconds / each["latent_v"].seconds for each in found]
    assert gains == sorted(gains)
    assert modes(shape(512), CPU, CONTEXTS[0], 1)[0] == "fold"
    assert modes(shape(512), CPU, CONTEXTS[-1], 1)[0] == "latent_v"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_smaller_rank_is_never_slower(context, batch):
    found = [ranking(shape(rank), CPU, context, batch) for rank in (16, 128, 512)]
    for mode in machines.FORMS:
        seconds = [each[mode].seconds for each in found]
        assert seconds == sorted(seconds)
    assert len({each["fold"].seconds for each in found}) == 1


def test_keys_that_have_to_be_expanded_lose_at_half_the_width():
    assert modes(shape(512), CPU, 32768, 1)[-1] == "latent"


def test_expanding_keys_pays_where_arithmetic_is_free():
    free = replace(CPU, attention=dict.fromkeys(machines.ATTENTIONS, Rates(1e-10, 0.0, 0.0)))
    assert modes(shape(64), free, 32768, 1)[:2] == ["latent", "latent_v"]


@pytest.mark.parametrize("attached", [1, 4])
def test_hook_is_fold_and_a_projection(attached):
    found = ranking(shape(attached=attached), CPU, 1024, 1)
    assert found["hook"].cache_bytes == found["fold"].cache_bytes
    projections = attached * 2 * 2 * 1024 * 64 * 4
    expected = attached * 1e-4 + projections * 1e-10
    assert math.isclose(found["hook"].seconds - found["fold"].seconds, expected, rel_tol=1e-9)
    assert found["hook"].moved_bytes - found["fold"].moved_bytes == projections


@pytest.mark.parametrize(("rank", "attached", "batch"), [(64, 4, 1), (512, 1, 3), (1, 2, 16)])
def test_cache_bytes(rank, attached, batch):
    context, d = 1000, 1024
    given = shape(rank, attached=attached)
    dense = 4 * 2 * d * context * batch * 4
    of_a_layer = dense / 4
    assert cache_bytes(given, "fold", context, batch) == cache_bytes(given, "hook", context, batch) == dense
    for mode, numbers in (("latent_v", d + rank), ("latent", 2 * rank)):
        expected = (4 - attached) * of_a_layer + attached * of_a_layer * numbers / (2 * d)
        assert cache_bytes(given, mode, context, batch) == expected


def test_a_window_bounds_the_cache_and_the_time():
    given = shape(attached=0, window=512)
    assert cache_bytes(given, "fold", 512, 1) == cache_bytes(given, "fold", 65536, 1)
    costs = [step_cost(given, CPU, "fold", context, 1) for context in (512, 65536)]
    assert costs[0] == costs[1]


def test_layers_out_of_reach_are_called_and_read():
    known, unknown = shape(layers=4), shape(layers=4, depth=6)
    difference = step_cost(unknown, CPU, "latent", 64, 1).overhead - step_cost(known, CPU, "latent", 64, 1).overhead
    assert math.isclose(difference, 2 * CPU.layer["fold"])


@pytest.mark.parametrize(
    ("machine", "limit"),
    [
        (replace(CPU, attention=dict.fromkeys(machines.ATTENTIONS, Rates(1e-6, 0.0, 0.0))), "memory"),
        (replace(CPU, attention=dict.fromkeys(machines.ATTENTIONS, Rates(0.0, 1e-6, 0.0))), "arithmetic"),
        (replace(CPU, attention=dict.fromkeys(machines.ATTENTIONS, FREE), step=1.0), "overhead"),
    ],
)
def test_the_binding_resource(machine, limit):
    assert {each.limit for each in predict(shape(), machine, 1024, 1)} == {limit}


def test_a_device_that_overlaps_takes_the_longer_of_the_two():
    cost = Cost(memory=2.0, arithmetic=1.0, overhead=2.5)
    assert (cost.seconds(overlaps=False), cost.seconds(overlaps=True)) == (5.5, 3.0)
    busy, idle = replace(CPU, overlaps=True), replace(CPU, overlaps=True, step=10.0)
    assert ranking(shape(), busy, 65536, 1)["fold"].limit == "memory"
    assert {each.limit for each in predict(shape(), idle, 1024, 1)} == {"overhead"}


@pytest.mark.parametrize(("slower", "first"), [(0.9 * TIE, "latent_v"), (1.1 * TIE, "fold")])
def test_a_tie_goes_to_the_smaller_cache(slower, first):
    """Everything free but the calls, in which latent_v exceeds fold by a little."""
    layer = {"fold": 1.0, "hook": 2.0, "latent_v": 1.0 + slower, "latent": 3.0}
    machine = Machine(
        "made up", "float32", True, False, Curve((1.0, 2.0), (1e-20, 1e-20)), Curve((1.0, 2.0), (1e-20, 1e-20)),
        dict.fromkeys(machines.ATTENTIONS, FREE), 0.0, layer,
    )  # fmt: skip
    assert modes(shape(), machine, 1024, 1) == [
        first,
        *[m for m in ("fold", "latent_v") if m != first],
        "hook",
        "latent",
    ]


def test_what_does_not_fit_comes_after_what_does():
    context = 65536
    given = shape(64)
    needed = {mode: each.cache_bytes + each.weight_bytes for mode, each in ranking(given, CPU, context, 1).items()}
    assert modes(given, CPU, context, 1)[0] == "latent_v"
    found = predict(given, CPU, context, 1, memory=needed["latent"])
    assert [each.fits for each in found] == [True, False, False, False]
    assert found[0].mode == "latent"
    assert [each.fits for each in predict(given, CPU, context, 1, memory=needed["fold"])] == [True] * 4


def test_weights_hold_what_a_mode_keeps_beside_them():
    found = ranking(shape(64), CPU, 1024, 1)
    assert found["fold"].weight_bytes == 10**8 + 10**7
    assert {found[mode].weight_bytes for mode in ("hook", "latent_v", "latent")} == {10**8 + 4 * 2 * 1024 * 64 * 4}


def test_latent_v_says_what_it_saves():
    why = ranking(shape(64), CPU, 32768, 1)["latent_v"].why
    assert why.startswith("V as 64 numbers a token in place of 1024: the step moves ")
    assert "fewer bytes" in why and "times faster than fold" in why
    mixed = replace(shape(64), layers=(*shape(64).layers, *shape(16).layers))
    assert "V as 16 to 64 numbers" in ranking(mixed, CPU, 32768, 1)["latent_v"].why


# Models.


@pytest.fixture
def constants(monkeypatch):
    """The made-up machine in place of this one."""
    monkeypatch.setattr(machines, "load", lambda *arguments, **settings: CPU)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "phi3", "gpt2", "gpt_neox"])
def test_shapes_are_those_of_the_model(family, make_model, subspace_of):
    model = make_model(family)
    subspace = subspace_of(model)
    found = shape_of(model, subspace, torch.float32)
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", 4)
    assert [layer.attached for layer in found.layers] == [layer in subspace.layers for layer in range(4)]
    for layer, site in zip(found.layers, find_sites(model).values(), strict=True):
        assert (layer.heads, layer.kv_heads, layer.width) == (4, kv_heads, site.width)
    assert found.weight_bytes == sum(each.numel() for each in model.parameters()) * 4
    windows = [64 if kind == "sliding_attention" else None for kind in getattr(config, "layer_types", None) or [""] * 4]
    assert [layer.window for layer in found.layers] == windows


@pytest.mark.parametrize("mode", machines.FORMS)
@pytest.mark.parametrize("tied", [True, False])
def test_cache_bytes_are_those_of_a_real_cache(mode, tied, make_model, subspace_of):
    model = make_model("llama", tie_word_embeddings=tied)
    subspace = subspace_of(model)
    found = shape_of(model, subspace, torch.float32)
    cache = DynamicCache(config=model.config)
    tokens = torch.arange(3 * 20).view(3, 20)
    with spd.attach(model, subspace, mode=mode), torch.no_grad():
        model(input_ids=tokens, past_key_values=cache)
    assert sum(spd.cache_bytes(cache).values()) == cache_bytes(found, mode, 20, 3)
    embedding = model.get_input_embeddings().weight
    assert found.weight_bytes - found.read_bytes == (0 if tied else embedding.numel() * 4)


def test_the_plan_of_a_model(make_model, subspace_of, constants):
    model = make_model("llama")
    found = plan(model, subspace_of(model), context=500, batch=2)
    assert {each.mode for each in found.predictions} == set(machines.FORMS)
    assert (found.mode, found.best) == (found.predictions[0].mode, found.predictions[0])
    assert all(each.possible and each.fits for each in found.predictions)
    assert found["latent"].cache_bytes < found["latent_v"].cache_bytes < found["fold"].cache_bytes
    assert found.explanation.startswith(f"{found.mode}: {found.best.why}; ")
    assert json.loads(json.dumps(found.to_dict()))["mode"] == found.mode


def test_modes_that_cannot_be_used_are_last_and_say_why(make_model, subspace_of, constants):
    model = make_model("gemma3")
    found = plan(model, subspace_of(model), context=500)
    assert [(each.mode, each.possible) for each in found.predictions[2:]] == [("latent_v", False), ("latent", False)]
    assert "attends within a window" in found["latent"].why
    assert "cannot be used here" not in found["latent"].why


def test_weights_that_are_shared_cannot_be_folded(model, subspace_of, constants):
    subspace = subspace_of(model)
    layers = model.model.layers
    layers[1].self_attn.k_proj.weight = layers[2].self_attn.k_proj.weight
    found = plan(model, subspace, context=16)
    assert found.predictions[-1].mode == "fold"
    assert "shares its weight" in found["fold"].why
    assert found.mode == "hook"


def test_a_rank_of_the_whole_width(model, subspace_of, constants):
    d = find_sites(model)[0].width
    basis = spd.Basis(torch.eye(d), torch.ones(d, dtype=torch.float64))
    found = plan(model, spd.Subspace({1: basis}, {1: basis}), context=500)
    assert found.mode == "fold"
    assert found["latent"].cache_bytes == found["fold"].cache_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context: expected a whole number from 1, got 0"),
        ({"context": 1.5}, "context"),
        ({"context": True}, "context"),
        ({"context": 513}, "context: the model has 512 positions, got 513"),
        ({"context": 8, "batch": 0}, "batch: expected a whole number from 1, got 0"),
        ({"context": 8, "device": "abacus"}, "device"),
        ({"context": 8, "device": "meta"}, "device: expected cpu or cuda"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, model, subspace_of):
    with pytest.raises(spd.InputError, match=message):
        plan(model, subspace_of(model), **arguments)


def test_the_subspace_of_another_model_is_refused(model, make_model, subspace_of):
    with pytest.raises(spd.InputError, match="subspace: calibrated on"):
        plan(make_model("llama"), subspace_of(model), context=8)


# attach(mode="auto", context=...)


@pytest.mark.parametrize(("layer", "mode"), [("fold", "fold"), ("latent_v", "latent_v"), ("latent", "latent")])
def test_auto_follows_the_plan(layer, mode, make_model, subspace_of, monkeypatch):
    """On a machine where calling one mode takes nothing and the others a second."""
    machine = replace(CPU, layer=dict.fromkeys(machines.FORMS, 1.0) | {layer: 0.0})
    monkeypatch.setattr(machines, "load", lambda *arguments, **settings: machine)
    model = make_model("llama")
    subspace = subspace_of(model)
    assert plan(model, subspace, context=64, batch=2).mode == mode
    with spd.attach(model, subspace, context=64, batch=2) as handle:
        assert handle.mode == mode
    with spd.attach(model, subspace) as handle:
        assert handle.mode == "fold"


@pytest.mark.parametrize("arguments", [{"a": 1.0, "b": -1.0}, {"sides": "k"}])
def test_auto_passes_over_what_its_arguments_rule_out(arguments, make_model, subspace_of, monkeypatch):
    machine = replace(CPU, layer=dict.fromkeys(machines.FORMS, 1.0) | {"latent_v": 0.0, "fold": 0.5})
    monkeypatch.setattr(machines, "load", lambda *arguments, **settings: machine)
    model = make_model("llama")
    with spd.attach(model, subspace_of(model), context=64, **arguments) as handle:
        assert handle.mode == "fold"


def test_auto_passes_over_what_fails_its_trial(make_model, subspace_of, monkeypatch):
    """Keys of an attention that does something to V after v_proj: no plan knows, the trial does."""
    machine = replace(CPU, layer=dict.fromkeys(machines.FORMS, 1.0) | {"latent_v": 0.0, "fold": 0.5})
    monkeypatch.setattr(machines, "load", lambda *arguments, **settings: machine)
    model = make_model("llama")

    def refuse(*arguments):
        raise spd.InputError("other logits")

    monkeypatch.setattr(sys.modules[spd.attach.__module__], "install_latent", refuse)
    with spd.attach(model, subspace_of(model), context=64) as handle:
        assert handle.mode == "fold"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 4}, "batch: expected a context beside it"),
        ({"context": 64, "mode": "fold"}, 'context: expected mode "auto"'),
        ({"context": 0}, "context: expected a whole number"),
        ({"context": 64, "batch": 0}, "batch: expected a whole number"),
    ],
)
def test_attach_refuses_bad_contexts(arguments, message, model, subspace_of, constants):
    with pytest.raises(spd.InputError, match=message):
        spd.attach(model, subspace_of(model), **arguments)
    spd.attach(model, subspace_of(model)).remove()


# Constants.


def test_a_curve_passes_its_points_and_goes_on():
    curve = Curve((1.0, 10.0, 1000.0), (2.0, 2.0, 200.0))
    assert [curve(x) for x in (0.1, 1, 5, 10)] == pytest.approx([2.0] * 4)
    assert [curve(x) for x in (100, 1000, 5000)] == pytest.approx([20.0, 200.0, 1000.0])


def test_rates_are_found_again():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(12, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e6, 1e9, 1e5])
    rates = torch.tensor([1e-4, 1e-10, 0.0, 3e-9], dtype=torch.float64)
    seconds = features @ rates
    found = machines._nonnegative(features / seconds[:, None])
    assert found == pytest.approx(rates.tolist(), rel=1e-6, abs=1e-16)
    noisy = features / (seconds * (1 + 0.3 * torch.rand(12, generator=generator, dtype=torch.float64)))[:, None]
    assert min(machines._nonnegative(noisy)) >= 0


def test_what_attention_does_is_counted_as_the_bound_counts_it():
    dense, half, latent = (Amount.of(2, 32, 8, 128, 1000, *ranks, 2) for ranks in ((None, None), (None, 64), (64, 64)))
    assert dense.bytes - half.bytes == 2 * 1000 * (1024 - 64) * 2 - 1024 * 64 * 2
    assert latent.flops > dense.flops > half.flops
    assert dense.numbers == half.numbers == latent.numbers - 2 * 1000 * 1024


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """How often the machine was measured, with a cache folder of its own."""
    calls = []

    def measure(device, dtype, *, progress=True):
        calls.append(dtype)
        return CPU

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machines, "measure", measure)
    return calls


def test_constants_are_measured_once(measured, tmp_path):
    assert machines.load(progress=False) == machines.load(progress=False) == CPU
    assert len(measured) == 1
    assert [path.name for path in (tmp_path / "spd").iterdir()] == [machines.cache_file("cpu", torch.float32).name]
    machines.load(progress=False, refresh=True)
    machines.load(dtype=torch.bfloat16, progress=False)
    assert len(measured) == 3


def test_another_number_of_threads_is_another_machine(measured, monkeypatch):
    machines.load(progress=False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    machines.load(progress=False)
    assert len(measured) == 2


def broken(content):
    """Files that are not what was written."""
    text = json.dumps(content)
    without = {key: value for key, value in content["machine"].items() if key != "layer"}
    negative = content["machine"] | {"step": -1.0}
    descending = content["machine"] | {"append": {"x": [2.0, 1.0], "y": [1.0, 1.0]}}
    return {
        "empty": "",
        "truncated": text[: len(text) // 2],
        "bytes": "\udcff",
        "list": "[]",
        "format": json.dumps(content | {"format": 0}),
        "key": json.dumps(content | {"key": content["key"] | {"device": "another"}}),
        "missing": json.dumps(content | {"machine": without}),
        "negative": json.dumps(content | {"machine": negative}),
        "nan": json.dumps(content | {"machine": content["machine"] | {"step": math.nan}}),
        "descending": json.dumps(content | {"machine": descending}),
    }


BROKEN = ["empty", "truncated", "bytes", "list", "format", "key", "missing", "negative", "nan", "descending"]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_damaged_file_is_measured_anew(fault, measured):
    path = machines.cache_file("cpu", torch.float32)
    machines.load(progress=False)
    whole = path.read_bytes()
    path.write_text(broken(json.loads(whole))[fault], errors="surrogateescape")
    assert machines.load(progress=False) == CPU
    assert len(measured) == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_obstacle(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machines.load(progress=False) == CPU


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert machines.cache_file("cpu", torch.float32).parent == tmp_path / ".cache" / "spd"


@pytest.fixture
def briefly(monkeypatch):
    """Sizes with which measuring takes a moment, and finds nothing worth knowing."""
    monkeypatch.setattr(machines, "_TOKENS", {"cpu": (32, 64)})
    monkeypatch.setattr(machines, "_LATENT_TOKENS", {"cpu": (32, 64)})
    monkeypatch.setattr(machines, "_APPEND_BYTES", {"cpu": (2**14, 2**16)})
    monkeypatch.setattr(machines, "_WEIGHTS", {"cpu": (64, 64)})
    monkeypatch.setattr(machines, "_FLUSH_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(machines, "_REPEATS", 1)
    monkeypatch.setattr(machines, "_STEPS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring(dtype, briefly, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = torch.random.get_rng_state()
    found = machines.load("cpu", dtype, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (found.measured, found.overlaps, found.dtype) == (True, False, str(dtype).removeprefix("torch."))
    assert all(sum(asdict(rates).values()) > 0 for rates in found.attention.values())
    assert found.step + found.layer["fold"] > 0
    for curve in (found.linear, found.append):
        assert list(curve.y) == sorted(curve.y) and curve.y[0] > 0
    monkeypatch.setattr(machines, "measure", lambda *arguments, **settings: pytest.fail("it is in the file"))
    assert machines.load("cpu", dtype, progress=False) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured")
def test_a_gpu_that_is_not_there_has_the_rates_of_an_h200(make_model, subspace_of):
    model = make_model("llama", max_position_embeddings=131072)
    found = plan(model.to(torch.bfloat16), subspace_of(model), context=131072, device="cuda")
    assert not found.measured and found.device == H200.name
    assert found.explanation.endswith("by the rates of NVIDIA H200 (spd_kernels.roofline), not measured here")
    assert all(each.fits is None for each in found.predictions)
    assert found["fold"].limit == "memory"


# The command line.


@pytest.fixture
def command(monkeypatch, capsys, constants, checkpoint, subspace_of, tmp_path):
    model, _ = spd.load_model(checkpoint, device="cpu")
    subspace_of(model).save_pretrained(tmp_path / "subspace")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        common = ["plan", "--model", checkpoint, "--subspace", tmp_path / "subspace", "--device", "cpu", "--quiet"]
        monkeypatch.setattr(sys, "argv", ["spd", *map(str, [*common, *arguments])])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


def test_the_command_prints_a_table_and_its_choice(command):
    status, out, _ = command("--context", 400, "--batch", 2)
    assert status == 0
    assert "400 tokens in the cache, batch 2, float32: made up" in out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert sorted(rows) == sorted(machines.FORMS)
    assert out.splitlines()[-1].startswith(f"choice: {rows[0]}: ")


def test_the_command_prints_json(command):
    status, out, _ = command("--context", 400, "--json")
    found = json.loads(out)
    assert (status, found["context"], found["batch"]) == (0, 400, 1)
    assert found["predictions"][0]["mode"] == found["mode"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--context", 0], "--context"), (["--context", 513], "context"), ([], "--context")],
)
def test_the_command_refuses_bad_input(arguments, named, command):
    status, out, error = command(*arguments)
    assert (status, out) == (2, "")
    assert named in error and len(error.splitlines()) == 1


def test_nothing_of_the_model_is_touched(make_model, subspace_of, constants):
    model = make_model("llama")
    subspace = subspace_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.forward = lambda *arguments, **settings: pytest.fail("a plan runs no model")
    plan(model, subspace, context=64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))
