"""A subspace for each sequence: what a batch says under a router is what its sequences say in runs of their own."""

import json
import threading
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model

import spd
from spd.intervention import Decision, NearestCentroid, Router

ROUTES = ["math", "code", None, "law", "math", None]
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
}
PLAIN = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
BEAMS = PLAIN | {"num_beams": 3}


def made_subspace(layers, rank_k, rank_v, seed, d=16):
    """Random directions: nothing here needs them calibrated."""
    generator = torch.Generator().manual_seed(seed)

    def basis(rank):
        square = torch.randn(d, d, generator=generator)
        return spd.Basis(torch.linalg.qr(square)[0][:, :rank].contiguous(), torch.ones(d, dtype=torch.float64))

    return spd.Subspace({layer: basis(rank_k) for layer in layers}, {layer: basis(rank_v) for layer in layers})


def made_subspaces(d=16):
    """Three that differ in their layers and ranks; layer 0 is in none, layer 1 in one."""
    return {
        "math": made_subspace([2, 3], 4, 4, 1, d),
        "code": made_subspace([1, 3], 8, 3, 2, d),
        "law": made_subspace([2, 3], 1, d - 1, 3, d),
    }


def width(model):
    return next(iter(spd.sites.find_sites(model).values())).width


def router_of(model, **arguments):
    return Router(made_subspaces(width(model)), **arguments)


def encoded(tokenizer, prompts):
    """Token ids and mask, padded on the left."""
    return dict(tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"))


def attached(model, subspaces, name, **arguments):
    return nullcontext() if name is None else spd.attach(model, subspaces[name], mode="hook", **arguments)


def cut(tokens):
    """Up to the end-of-sequence token, behind which there is padding."""
    tokens = tokens.tolist()
    return tokens[: tokens.index(0) + 1] if 0 in tokens else tokens


@pytest.fixture(scope="module")
def six(prompts):
    """Six prompts of different lengths, none a copy of another."""
    found = [f"{'so ' * (3 * number % 5)}{prompt}" for number, prompt in enumerate(prompts[:6])]
    assert len({len(prompt) for prompt in found}) > 3
    return found


@pytest.mark.parametrize("settings", [PLAIN, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", MODELS)
def test_six_prompts_say_what_they_say_alone(name, settings, make_model, tokenizer, six):
    family, changes = MODELS[name]
    model = make_model(family, **changes)
    router = router_of(model)
    if family == "qwen2":
        assert model.model.layers[0].self_attn.k_proj.bias is not None
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(changes)
    alone, unrouted = [], []
    for prompt, route in zip(six, ROUTES, strict=True):
        tokens = encoded(tokenizer, [prompt])
        start = tokens["input_ids"].shape[1]
        with attached(model, router.subspaces, route):
            alone.append(cut(model.generate(**tokens, **settings)[0, start:]))
        unrouted.append(cut(model.generate(**tokens, **settings)[0, start:]))
    batch = encoded(tokenizer, six)
    with spd.attach(model, router) as handle, router.use(ROUTES):
        assert handle.mode == "hook"
        found = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    assert [cut(row) for row in found] == alone
    changed = [i for i in range(6) if alone[i] != unrouted[i]]
    assert len(changed) >= 2, "the subspaces change what is said"
    again = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    assert [cut(row) for row in again] == unrouted, "nothing is left behind"


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, -1.0), (0.5, 0.5)])
@pytest.mark.parametrize(("family", "sides"), [("qwen3", "k"), ("phi3", "v"), ("gpt2", "kv"), ("gpt_neox", "kv")])
def test_logits_differ_by_no_more_than_rounding(family, sides, a, b, make_model, tokenizer, six):
    """A batch of one route everywhere is the control: what batching alone costs, the hook costs too."""
    model = make_model(family)
    router = router_of(model)
    batch = encoded(tokenizer, six)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        whole = {}
        for name in (None, *router.names):
            with attached(model, router.subspaces, name, sides=sides, a=a, b=b):
                whole[name] = model(**batch).logits
        with spd.attach(model, router, sides=sides, a=a, b=b), router.use(ROUTES):
            found = model(**batch).logits
    for row, route in enumerate(ROUTES):
        torch.testing.assert_close(found[row][real[row]], whole[route][row][real[row]], rtol=0, atol=2e-5)
        if route is not None:
            assert float((found[row] - whole[None][row])[real[row]].abs().max()) > 1e-3


@pytest.mark.parametrize(
    "how",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"use_cache": False}],
    ids=["static cache", "prompt chunks", "no cache"],
)
@pytest.mark.parametrize("settings", [PLAIN, BEAMS], ids=["greedy", "beams"])
def test_other_ways_through_generate(how, settings, model, tokenizer, six):
    router, batch = router_of(model), encoded(tokenizer, six)
    with spd.attach(model, router), router.use(ROUTES):
        usual = model.generate(**batch, **settings)
        other = model.generate(**batch, **settings, **how)
    assert torch.equal(usual, other)


def test_sampled_rows_carry_the_route_of_their_prompt(model, tokenizer, six):
    """Two samples a prompt: what each was sampled from is what its own subspace says, token by token."""
    router, batch = router_of(model), encoded(tokenizer, six)
    torch.manual_seed(0)
    with spd.attach(model, router), router.use(ROUTES):
        out = model.generate(
            **batch,
            do_sample=True,
            top_k=0,
            num_return_sequences=2,
            min_new_tokens=6,
            max_new_tokens=6,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert not torch.equal(out.sequences[::2], out.sequences[1::2]), "it samples"
    scored = torch.stack(out.logits, dim=1)  # (rows, new, vocabulary)
    mask = torch.cat((batch["attention_mask"].repeat_interleave(2, 0), torch.ones(12, 6, dtype=torch.long)), 1)
    for row in range(12):
        own = mask[row].bool()
        with attached(model, router.subspaces, ROUTES[row // 2]), torch.no_grad():
            alone = model(out.sequences[row][own][None]).logits[0, -7:-1]
        torch.testing.assert_close(scored[row], alone, rtol=0, atol=5e-5)


def test_one_launch_for_each_layer_and_side(make_model, tokenizer, six):
    """A whole graph under torch.compile, in which new routes, none of them traced, count."""
    model = make_model("llama")
    router, batch = router_of(model), encoded(tokenizer, six)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with spd.attach(model, router), torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend=keep)
        for routes in (ROUTES, ROUTES[::-1], [None] * 6):
            with router.use(routes):
                expected = model(**batch).logits
                found = compiled(**batch).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        with pytest.raises(spd.InputError, match="a forward pass outside"):
            model(**batch)
    assert len(graphs) == 1, "routes are data"
    launches = [node for node in graphs[0].graph.nodes if "project_routed" in str(node.target)]
    assert len(launches) == 2 * len({1, 2, 3}), "K and V of the layers that any subspace has"


def test_a_model_compiled_before_it_is_attached_obeys(make_model, tokenizer, six):
    model = make_model("llama")
    router, batch = router_of(model), encoded(tokenizer, six)
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        base = compiled(**batch).logits
        for subspace in (router, router.subspaces["math"]):
            with spd.attach(model, subspace, mode="hook"), router.use(ROUTES) if subspace is router else nullcontext():
                expected = model(**batch).logits
                assert float((expected - base).abs().max()) > 1e-2
                torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(**batch).logits, base, rtol=0, atol=1e-5)


def test_the_index_is_overwritten_not_replaced(model):
    router = router_of(model)
    with spd.attach(model, router):
        with router.use(["math", None]):
            first = router._lanes[0].index(torch.device("cpu"))
            before = first.tolist()
        with router.use([None, "math"]), torch.inference_mode():
            second = router._lanes[0].index(torch.device("cpu"))
        assert second.data_ptr() == first.data_ptr()
        assert before == second.tolist()[::-1] and -1 in before


def test_gradients_flow_as_through_the_hook(make_model, tokenizer, six):
    gradients = []
    for routed in (True, False):
        model = make_model("llama")
        router = router_of(model)
        batch = encoded(tokenizer, six[:2])
        real = batch["attention_mask"]
        if routed:
            with spd.attach(model, router), router.use(["math", "code"]):
                model(**batch, labels=batch["input_ids"]).logits.mul(real[..., None]).square().sum().backward()
        else:
            for row, name in enumerate(["math", "code"]):
                with attached(model, router.subspaces, name):
                    logits = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits
                    logits.mul(real[row : row + 1, :, None]).square().sum().backward()
        gradients.append(model.model.layers[1].self_attn.v_proj.weight.grad)
    scale = float(gradients[1].abs().max())
    assert scale > 0
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=0, atol=1e-4)


def test_bfloat16_and_autocast_follow_the_activations(make_model, tokenizer, six):
    model = make_model("llama").to(torch.bfloat16)
    router, batch = router_of(model), encoded(tokenizer, six)
    with torch.no_grad(), spd.attach(model, router):
        with router.use("code"):
            found = model(**batch).logits
        with router.use(None):
            alone = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(alone, model(**batch).logits), "what is left alone is left bit for bit"
        with spd.attach(model, router.subspaces["code"], mode="hook"):
            expected = model(**batch).logits
    assert found.dtype == torch.bfloat16
    error = (found - expected).float().norm() / expected.float().norm()
    assert error < 2e-2 < (found - alone).float().norm() / alone.float().norm()
    model = make_model("llama")
    with torch.no_grad(), spd.attach(model, router), router.use(ROUTES), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**batch).logits).all()


def test_a_batch_that_is_no_multiple_of_the_routes_is_refused(model, tokenizer, six):
    router = router_of(model)
    with spd.attach(model, router):
        with (
            router.use(["math", None, "code", "law"]),
            pytest.raises(spd.InputError, match=r"multiple of the 4 .*\(6, "),
        ):
            model.generate(**encoded(tokenizer, six), **PLAIN)
        with router.use("math"):
            model.generate(**encoded(tokenizer, six), **PLAIN)


def test_a_forgotten_use_is_refused_not_silent(model, tokenizer, six):
    router, batch = router_of(model), encoded(tokenizer, six)
    with torch.no_grad():
        base = model(**batch).logits
        handle = spd.attach(model, router)
        with pytest.raises(spd.InputError, match=r"forward pass outside `with router\.use"):
            model(**batch)
        with router.use(None):
            assert torch.equal(model(**batch).logits, base)
        with pytest.raises(RuntimeError, match="on purpose"), router.use(ROUTES):
            raise RuntimeError("on purpose")
        with pytest.raises(spd.InputError, match="forward pass outside"):
            model(**batch)
        handle.remove()
        handle.remove()
        assert torch.equal(model(**batch).logits, base)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(spd.InputError, match="attached to no model"), router.use(ROUTES):
        pass


def test_one_block_at_a_time_in_all_threads(model):
    router, refused = router_of(model), []

    def other():
        try:
            with router.use(None):
                pass
        except spd.InputError as error:
            refused.append(str(error))

    with spd.attach(model, router), router.use(ROUTES):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        other()
    assert len(refused) == 2 and all("another block is in place" in each for each in refused)


def test_a_router_serves_two_models(make_model, tokenizer, six):
    first, second = make_model("llama"), make_model("llama", seed=1)
    router, batch = router_of(first), encoded(tokenizer, six)
    with torch.no_grad():
        expected = []
        for model in (first, second):
            with spd.attach(model, router.subspaces["law"], mode="hook"):
                expected.append(model(**batch).logits)
        with spd.attach(first, router):
            with spd.attach(second, router), router.use("law"):
                found = [first(**batch).logits, second(**batch).logits]
            with router.use("law"):
                assert torch.equal(first(**batch).logits, found[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_other_interventions_are_refused_beside_it(model, tokenizer, examples):
    router = router_of(model)
    with spd.attach(model, router):
        with pytest.raises(spd.InputError, match="carries an intervention already"):
            spd.attach(model, router)
        with pytest.raises(spd.InputError, match="calibrate: the model carries"):
            spd.calibrate(model, tokenizer, examples, progress=False)
        with pytest.raises(spd.InputError, match="carries an intervention already"):
            spd.attach(deepcopy(model), router)
    tuned = get_peft_model(model, LoraConfig(target_modules=["k_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(spd.InputError, match=r"'math'.*carries an adapter"):
        spd.attach(tuned, router)


@pytest.mark.parametrize("arguments", [{"mode": "fold"}, {"mode": "latent_v"}, {"context": 1024}])
def test_a_router_is_computed_on_the_outputs(arguments, model):
    with pytest.raises(spd.InputError, match=r'a router has mode "hook" alone.*got (mode|context)'):
        spd.attach(model, router_of(model), **arguments)


def test_every_subspace_is_checked_when_it_is_attached(model, make_model, subspace_of):
    good = made_subspaces()
    for bad, message in (
        (made_subspace([7], 4, 4, 0), "'bad': subspace: it has layer 7"),
        (made_subspace([2], 4, 4, 0, d=8), "'bad': subspace: K of layer 2 has d = 8"),
        (subspace_of(make_model("llama")), "'bad': subspace: calibrated on"),
    ):
        router = Router(good | {"bad": bad})
        with pytest.raises(spd.InputError, match=message):
            spd.attach(model, router)
        assert not any(module._forward_hooks for module in model.modules()) and not router._lanes


def test_bad_arguments_are_refused(model, tokenizer):
    subspaces = made_subspaces()
    for wrong in ({}, [subspaces["math"]], {"": subspaces["math"]}, {"math": "folder"}):
        with pytest.raises(spd.InputError, match="subspaces: expected"):
            Router(wrong)
    with pytest.raises(spd.InputError, match="choose: expected"):
        Router(subspaces, choose="math")
    with pytest.raises(spd.InputError, match="'law' among the names"):
        Router(
            {"math": subspaces["math"], "code": subspaces["code"]},
            choose=NearestCentroid(model, tokenizer, {"law": ["a"], "math": ["b"]}),
        )
    router = Router(subspaces)
    with spd.attach(model, router):
        for routes, message in (
            (["math", "cod"], r"routes\[1\]: expected one of .*'cod'; did you mean 'code'"),
            ("maths", "did you mean 'math'"),
            ([3], "got 3"),
            ([], "routes: expected a name or None"),
        ):
            with pytest.raises(spd.InputError, match=message), router.use(routes):
                pass
    with pytest.raises(spd.InputError, match="nothing to choose with"):
        router.choose(["a"])


def test_a_function_chooses_and_is_recorded(prompts):
    router = Router(made_subspaces(), choose=lambda prompt: "math" if "3 and 3" in prompt else None)
    first, second = router.choose(prompts[:2])
    assert (first.name, second.name) == ("math", None)
    router.choose(["more"])
    assert [each.name for each in router.decisions] == ["math", None, None]
    record = json.loads(json.dumps([asdict(each) for each in router.decisions]))
    assert [Decision(**each) for each in record] == router.decisions
    assert record[0]["prompt"] == prompts[0] and "lambda" in record[0]["by"]
    wrong = Router(made_subspaces(), choose=lambda prompt: "physics")
    with pytest.raises(spd.InputError, match=r"routes\[0\].*'physics'"):
        wrong.choose(["a"])
    assert wrong.decisions == []


KINDS = {
    "math": [f"how many apples are {n} and {n + 1}?" for n in range(8)],
    "code": [f"def f{n}(x): return x[{n}:] + [0] * {n}" for n in range(8)],
}


@pytest.mark.parametrize("features", ["hidden", "embedding"])
def test_the_nearest_centroid_tells_kinds_of_prompts_apart(features, model, tokenizer):
    chooser = NearestCentroid(model, tokenizer, KINDS, features=features, batch_size=3)
    new = ["how many apples are 20 and 31 ?", "def g(y): return y[3:]", "how many apples are 9 and 9?"]
    router = Router(made_subspaces(), choose=chooser)
    free = router.choose(new)
    assert [each.name for each in free] == ["math", "code", "math"]
    with spd.attach(model, router):
        assert router.choose(new) == free, "it is asked with every sequence left alone"
    assert json.loads(json.dumps(asdict(free[0])))["scores"].keys() == {"math", "code"}
    for decision in free:
        assert max(decision.scores, key=decision.scores.get) == decision.name
        assert features in decision.by
    gaps = [max(each.scores.values()) - min(each.scores.values()) for each in free]
    strict = NearestCentroid(model, tokenizer, KINDS, features=features, margin=sorted(gaps)[1], batch_size=3)
    assert sum(each.name is None for each in strict.decide(new)) == 1
    assert chooser.decide([]) == []


def test_batching_and_length_do_not_change_what_is_chosen(model, tokenizer):
    one, many = (NearestCentroid(model, tokenizer, KINDS, batch_size=size) for size in (1, 16))
    for first, second in zip(one.decide(KINDS["math"]), many.decide(KINDS["math"]), strict=True):
        assert first.scores == pytest.approx(second.scores, abs=1e-4)
    short = NearestCentroid(model, tokenizer, KINDS, max_length=4)
    beginning = tokenizer.decode(tokenizer(KINDS["code"][0])["input_ids"][:4])
    assert short.decide([KINDS["code"][0]])[0].scores == pytest.approx(short.decide([beginning])[0].scores, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"math": ["a"]}}, "at least two names"),
        ({"prompts": {"math": ["a"], "code": []}}, r"not so for \['code'\]"),
        ({"prompts": {"math": "abc", "code": ["a"]}}, r"not so for \['math'\]"),
        ({"prompts": {"math": ["a"], "code": [""]}}, "no token at all"),
        ({"features": "attention"}, "features: expected one of hidden, embedding"),
        ({"margin": -1.0}, "margin: expected"),
        ({"max_length": 0}, "max_length: expected"),
        ({"batch_size": True}, "batch_size: expected"),
    ],
)
def test_bad_centroids_are_refused(changes, message, model, tokenizer):
    with pytest.raises(spd.InputError, match=message):
        NearestCentroid(model, tokenizer, **({"prompts": KINDS} | changes))


def test_centroids_are_made_on_a_model_without_an_intervention(model, tokenizer):
    with spd.attach(model, router_of(model)), pytest.raises(spd.InputError, match="NearestCentroid: the model carries"):
        NearestCentroid(model, tokenizer, KINDS)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_routes_every_prompt_whatever_its_batch(temperature, model, tokenizer, six):
    """Prompts are sorted by length and cut into batches; a prompt has its own random numbers in every run."""
    router = router_of(model)
    settings = {"temperature": temperature, "max_new_tokens": 8, "progress": False}
    alone = {}
    for name in (None, *router.names):
        with attached(model, router.subspaces, name):
            alone[name] = spd.generate(model, tokenizer, six, **settings)
    expected = [alone[route][index] for index, route in enumerate(ROUTES)]
    assert expected != alone[None]
    with spd.attach(model, router):
        for batch_size in (1, 4, 6):
            found = router.generate(model, tokenizer, six, routes=ROUTES, batch_size=batch_size, **settings)
            assert found == expected
        assert router.generate(model, tokenizer, six, routes="law", **settings) == alone["law"]
        with pytest.raises(spd.InputError, match="one for each of 6 prompts, got 2"):
            router.generate(model, tokenizer, six, routes=["law", None], **settings)
        with pytest.raises(spd.InputError, match="forward pass outside"):
            spd.generate(model, tokenizer, six, **settings)


def test_generate_asks_the_chooser_and_resumes(model, tokenizer, six, tmp_path):
    chosen = dict(zip(six, ROUTES, strict=True))
    router = router_of(model, choose=chosen.__getitem__)
    out = tmp_path / "completions.jsonl"
    settings = {"out": out, "max_new_tokens": 6, "batch_size": 2, "progress": False}
    with spd.attach(model, router):
        whole = router.generate(model, tokenizer, six, **settings)
        assert [each.name for each in router.decisions] == ROUTES
        lines = out.read_text().splitlines(keepends=True)
        out.write_text("".join(lines[:3]))
        assert router.generate(model, tokenizer, six, **settings) == whole
        with pytest.raises(spd.InputError, match="another tag"):
            router.generate(model, tokenizer, six, routes="math", **settings)
    others = spd.Router(router.subspaces | {"math": router.subspaces["code"]})
    with spd.attach(model, others), pytest.raises(spd.InputError, match="another intervention, tag"):
        others.generate(model, tokenizer, six, routes=ROUTES, **settings)


def test_a_file_of_another_route_is_refused(model, tokenizer, six, tmp_path):
    router = router_of(model)
    settings = {"out": tmp_path / "completions.jsonl", "max_new_tokens": 6, "progress": False}
    with spd.attach(model, router):
        with router.use("math"):
            whole = spd.generate(model, tokenizer, six, **settings)
        with router.use("math"):
            assert spd.generate(model, tokenizer, six, **settings) == whole
        for route in ("code", None):
            with router.use(route), pytest.raises(spd.InputError, match="another intervention"):
                spd.generate(model, tokenizer, six, **settings)
