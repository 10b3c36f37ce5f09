"""Modes `latent_v` and `latent`: the hook's logits from a cache of r numbers a token, however it is generated."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import spd
from spd.intervention import cache_bytes
from spd.intervention.key_recipe import KeyRecipe
from spd.sites import find_sites

MODES = ("latent_v", "latent")
COMPILED = [pytest.param("latent_v", marks=pytest.mark.slow), "latent"]  # half a minute each

LATENT_V = [
    *("qwen3", "qwen2", "llama", "phi3", "gpt2", "gpt_neox", "mistral", "granite", "olmo2", "smollm3", "cohere"),
    *("starcoder2", "hunyuan", "gemma3_full", "glm4", "phi"),
]
PARTLY_ROTATED = ("gpt_neox", "glm4", "phi")
FITTING = [("latent_v", family) for family in LATENT_V]
FITTING += [("latent", family) for family in LATENT_V if family not in PARTLY_ROTATED]

PROMPTS = torch.tensor(
    [[5, 9, 21, 7, 40, 3, 11, 60, 2], [1, 1, 1, 1, 33, 8, 90, 14, 6], [1, 70, 2, 5, 5, 81, 4, 19, 77]]
)
MASK = (torch.arange(9) >= torch.tensor([[0], [4], [1]])).long()  # left padding of three lengths
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def uneven_subspace(model, layers=(1, 3)):
    """Bases whose ranks differ by layer and side."""
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(1)

    def basis(d, less):
        u = torch.linalg.qr(torch.randn(d, d // 2 - less, generator=generator)).Q.contiguous()
        return spd.Basis(u, torch.ones(d, dtype=torch.float64))

    return spd.Subspace(
        {layer: basis(sites[layer].width, layer % 2) for layer in layers},
        {layer: basis(sites[layer].width, 2 * (layer == 3)) for layer in layers},
    )


def step(model, cache, tokens=PROMPTS, mask=MASK):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize(("mode", "family"), FITTING, ids=str)
def test_logits_are_those_of_the_hook(mode, family, make_model):
    """Prefill of padded prompts, then greedy decoding."""
    model = make_model(family)
    subspace = uneven_subspace(model)
    found = {}
    for name in ("hook", mode):
        with spd.attach(model, subspace, mode=name) as handle:
            assert handle.mode == name
            out = model.generate(
                PROMPTS, attention_mask=MASK, output_logits=True, return_dict_in_generate=True, **GREEDY
            )
            found[name] = torch.stack(out.logits)
    plain = model.generate(PROMPTS, attention_mask=MASK, output_logits=True, return_dict_in_generate=True, **GREEDY)
    torch.testing.assert_close(found[mode], found["hook"], rtol=0, atol=2e-5)
    assert (torch.stack(plain.logits) - found["hook"]).abs().max() > 1e-2, "the projection does something"


def generated(model, rows=slice(None), **changes):
    torch.manual_seed(7)
    return model.generate(PROMPTS[rows], attention_mask=MASK[rows], **(GREEDY | changes))


GENERATION = {
    "greedy": lambda model, other: generated(model),
    "sampling": lambda model, other: generated(model, do_sample=True),
    "beams": lambda model, other: generated(model, num_beams=3),
    "several samples a prompt": lambda model, other: generated(model, do_sample=True, num_return_sequences=2),
    "assisted": lambda model, other: generated(model, slice(1), assistant_model=other),
    "prompt look-up": lambda model, other: generated(model, slice(1), prompt_lookup_num_tokens=3),
    "chunked prefill": lambda model, other: generated(model, prefill_chunk_size=4),
    "static cache": lambda model, other: generated(model, cache_implementation="static"),
    "no cache": lambda model, other: generated(model, use_cache=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_generating_gives_the_hooks_tokens(mode, how, make_model):
    model, other = make_model("qwen3"), make_model("llama", seed=1)
    subspace, found = uneven_subspace(model), {}
    for name in ("hook", mode):
        with spd.attach(model, subspace, mode=name):
            found[name] = GENERATION[how](model, other)
    assert torch.equal(found[mode], found["hook"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
def test_the_models_own_attention_function_may_be_any(mode, attention, make_model):
    model = make_model("qwen3")
    model.set_attn_implementation(attention)
    subspace, found = uneven_subspace(model), {}
    for name in ("hook", mode):
        with spd.attach(model, subspace, mode=name):
            found[name] = GENERATION["greedy"](model, None)
    assert torch.equal(found[mode], found["hook"])
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("mode", COMPILED)
def test_a_static_cache_compiles_whole(mode, make_model):
    """fullgraph: the traced step has no break. The backend that runs the trace as it is keeps this quick."""
    model = make_model("qwen3")
    subspace, found = uneven_subspace(model), {}
    for name in ("hook", mode):
        torch.compiler.reset()
        with spd.attach(model, subspace, mode=name):
            cache, mask = StaticCache(config=model.config, max_cache_len=16), MASK
            logits = [step(model, cache)[:, -1:]]
            decode = torch.compile(model.forward, fullgraph=True, backend="eager") if name == mode else model.forward
            for number in range(3):
                mask = torch.cat((mask, mask.new_ones(3, 1)), dim=1)
                positions = mask.sum(-1, keepdim=True) - 1
                token = PROMPTS[:, number : number + 1]
                out = decode(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
                logits.append(out.logits)
        found[name] = torch.cat(logits, dim=1)
    torch.testing.assert_close(found[mode], found["hook"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_holds_what_it_says(mode, make_model):
    model = make_model("llama")
    subspace = uneven_subspace(model)
    with spd.attach(model, subspace, mode=mode):
        cache = DynamicCache(config=model.config)
        step(model, cache)
        for _ in range(3):
            model(PROMPTS[:, :1], past_key_values=cache)
    taken, d, tokens = cache_bytes(cache), 16, 3 * 12
    assert taken[0] == taken[2] == 2 * d * 4 * tokens, "other layers are as they were"
    for layer in (1, 3):
        r_k, r_v = subspace.k[layer].rank, subspace.v[layer].rank
        kept = (d if mode == "latent_v" else r_k) + r_v
        assert taken[layer] == kept * 4 * tokens
        memory = sum(t.untyped_storage().nbytes() for t in (cache.layers[layer].keys, cache.layers[layer].values))
        assert memory <= kept * 4 * 3 * (12 + 16), "little is spare"


@pytest.mark.parametrize("mode", MODES)
def test_a_copied_cache_goes_its_own_way(mode, make_model):
    model = make_model("qwen3")
    with spd.attach(model, uneven_subspace(model), mode=mode):
        cache = DynamicCache(config=model.config)
        step(model, cache)
        twin = copy.deepcopy(cache)
        step_mask = torch.cat((MASK, MASK.new_ones(3, 1)), dim=1)
        for token in (4, 9):
            step(model, twin, torch.full((3, 1), token), step_mask)
        again = step(model, cache, torch.full((3, 1), 4), step_mask)
        fresh = DynamicCache(config=model.config)
        step(model, fresh)
        assert torch.equal(again, step(model, fresh, torch.full((3, 1), 4), step_mask))
    assert twin.get_seq_length() == 11 and cache.get_seq_length() == 10


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_reordered_repeated_selected_and_cropped(mode, make_model):
    """Each against a cache that was built that way."""
    model = make_model("qwen3")
    subspace = uneven_subspace(model)
    with spd.attach(model, subspace, mode=mode):

        def cached(rows):
            cache = DynamicCache(config=model.config)
            step(model, cache, PROMPTS[rows], MASK[rows])
            # Past the first update, so that there is a buffer with room to spare.
            step(model, cache, PROMPTS[rows, :1], torch.cat((MASK[rows], MASK.new_ones(len(rows), 1)), dim=1))
            return cache

        def next_logits(cache, rows):
            return step(model, cache, PROMPTS[rows, 1:2], torch.cat((MASK[rows], MASK.new_ones(len(rows), 2)), dim=1))

        def longer_and_back(cache):
            step(model, cache, PROMPTS[:, :2], torch.cat((MASK, MASK.new_ones(3, 3)), dim=1))
            cache.crop(-2)

        for change, rows in (
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (
                lambda cache: (
                    step(model, cache, PROMPTS[:, :2], torch.cat((MASK, MASK.new_ones(3, 3)), 1)),
                    cache.crop(-2),
                ),
                [0, 1, 2],
            ),
        ):
            cache = cached([0, 1, 2])
            change(cache)
            torch.testing.assert_close(next_logits(cache, rows), next_logits(cached(rows), rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_model_comes_back(mode, make_model):
    model = make_model("qwen3")
    base, state = step(model, None), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = [layer.self_attn.config for layer in model.model.layers]
    model.train()
    with pytest.raises(RuntimeError, match="on purpose"), spd.attach(model, uneven_subspace(model), mode=mode):
        assert model.training
        raise RuntimeError("on purpose")
    model.eval()
    assert torch.equal(step(model, None), base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [layer.self_attn.config for layer in model.model.layers] == configs
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_caches_of_another_mode_are_refused(mode, make_model):
    model = make_model("qwen3")
    subspace = uneven_subspace(model)
    dense = DynamicCache(config=model.config)
    step(model, dense)
    with spd.attach(model, subspace, mode=mode):
        with pytest.raises(spd.InputError, match="holds keys and values of another mode"):
            model(PROMPTS[:, :1], past_key_values=dense)
        latent = DynamicCache(config=model.config)
        step(model, latent)
    with pytest.raises(spd.InputError, match="whose intervention was removed"):
        model(PROMPTS[:, :1], past_key_values=latent)
    with (
        spd.attach(model, subspace, mode=mode),
        pytest.raises(spd.InputError, match="latents of an intervention that was removed"),
    ):
        model(PROMPTS[:, :1], past_key_values=latent)


@pytest.mark.parametrize(
    ("mode", "family", "message"),
    [
        ("latent_v", "gemma2", 'Gemma2Attention.* caps its attention logits; mode "fold" can'),
        ("latent", "gpt_oss", 'GptOssAttention.* has attention sinks; mode "fold" can'),
        ("latent_v", "gemma3", 'Gemma3Attention.* attends within a window .*; mode "fold" can'),
        ("latent", "gpt_neox", 'GPTNeoXAttention.* rotates only a part .*; mode "latent_v" can'),
        ("latent", "glm4", 'Glm4Attention.* rotates only a part .*; mode "latent_v" can'),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_families_that_cannot_are_refused_by_name(mode, family, message, make_model):
    model = make_model(family)
    with pytest.raises(spd.InputError, match=message):
        spd.attach(model, uneven_subspace(model), mode=mode)
    spd.attach(model, uneven_subspace(model), mode="hook").remove()


def test_angles_that_change_with_the_length_are_refused(make_model):
    model = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(spd.InputError, match=r'angles that change with the length \(dynamic\); mode "latent_v" can'):
        spd.attach(model, uneven_subspace(model), mode="latent")
    spd.attach(model, uneven_subspace(model), mode="latent_v").remove()


def test_a_mode_that_computes_something_else_is_refused(make_model, monkeypatch):
    """The control of the probe: latents that are expanded wrongly are noticed before anything is generated."""
    model = make_model("qwen3")
    honest = KeyRecipe.once
    monkeypatch.setattr(KeyRecipe, "once", lambda self, table: 0.5 * honest(self, table))
    with pytest.raises(spd.InputError, match="makes its keys"):
        spd.attach(model, uneven_subspace(model), mode="latent")
    monkeypatch.undo()
    from spd.intervention import latent

    wrong = latent.latent_attention
    monkeypatch.setattr(latent, "latent_attention", lambda *args, **kwargs: 1.01 * wrong(*args, **kwargs))
    with pytest.raises(spd.InputError, match="gives other logits under it"):
        spd.attach(model, uneven_subspace(model), mode="latent_v")
    monkeypatch.undo()
    spd.attach(model, uneven_subspace(model), mode="latent").remove()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "latent", "a": 0.5, "b": 0.5}, "expected a = 0 and b = 1"),
        ({"mode": "latent_v", "a": 1.0, "b": -1.0}, "expected a = 0 and b = 1"),
        ({"mode": "latent", "sides": "v"}, "expected sides that include 'kv'"),
        ({"mode": "latent_v", "sides": "k"}, "expected sides that include 'v'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, make_model):
    model = make_model("qwen3")
    with pytest.raises(spd.InputError, match=message):
        spd.attach(model, uneven_subspace(model), **arguments)


def test_v_alone(make_model):
    model = make_model("qwen3")
    subspace, found = uneven_subspace(model), {}
    for name in ("hook", "latent_v"):
        with spd.attach(model, subspace, mode=name, sides="v"):
            found[name] = GENERATION["greedy"](model, None)
    assert torch.equal(found["latent_v"], found["hook"])


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_agrees_to_its_precision(mode, make_model):
    model = make_model("qwen3").to(torch.bfloat16)
    subspace, found = uneven_subspace(model), {}
    for name in ("hook", mode):
        with spd.attach(model, subspace, mode=name):
            cache = DynamicCache(config=model.config)
            step(model, cache)
            found[name] = step(model, cache, PROMPTS[:, :1], torch.cat((MASK, MASK.new_ones(3, 1)), dim=1)).float()
    difference = (found[mode] - found["hook"]).norm() / found["hook"].norm()
    assert difference < 3e-2


@pytest.mark.parametrize("mode", MODES)
def test_gradients_flow_as_under_the_hook(mode, make_model):
    """A loss over a whole text, without a cache."""
    model = make_model("qwen3")
    subspace, found = uneven_subspace(model), {}
    weight = model.model.layers[1].self_attn.v_proj.weight
    for name in ("hook", mode):
        with spd.attach(model, subspace, mode=name), torch.enable_grad():
            loss = model(PROMPTS, labels=PROMPTS, use_cache=False).loss
            found[name] = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(found[mode], found["hook"])


class TestWhatUsersDoInBetween:
    """Each against the hook under the same treatment."""

    @staticmethod
    def both(model, mode, treat, atol=2e-5, layers=(1, 3)):
        subspace, found = uneven_subspace(model, layers), {}
        for name in ("hook", mode):
            with spd.attach(model, subspace, mode=name):
                found[name] = treat(model)
        torch.testing.assert_close(found[mode], found["hook"], rtol=0, atol=atol)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_tree_of_drafts(self, mode, make_model):
        """Three tokens that see what came before, and themselves, but not one another."""

        def treat(model):
            cache = DynamicCache(config=model.config)
            model(PROMPTS[:1, :6], past_key_values=cache)
            mask = torch.cat((torch.ones(3, 6, dtype=torch.bool), torch.eye(3, dtype=torch.bool)), dim=1)[None, None]
            positions = torch.full((1, 3), 6)
            return model(PROMPTS[:1, 6:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits

        self.both(make_model("qwen3"), mode, treat)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_bias_in_the_mask(self, mode, make_model):
        def treat(model):
            cache = DynamicCache(config=model.config)
            model(PROMPTS[:1, :6], past_key_values=cache)
            mask = torch.zeros(1, 1, 1, 7)
            mask[..., 2:5] = -2.0
            return model(PROMPTS[:1, 6:7], attention_mask=mask, past_key_values=cache).logits

        self.both(make_model("qwen3"), mode, treat)

    @pytest.mark.parametrize("mode", MODES)
    def test_the_attention_function_is_changed(self, mode, make_model):
        model = make_model("qwen3")

        def treat(model):
            model.set_attn_implementation("sdpa")
            try:
                return model(PROMPTS).logits
            finally:
                model.set_attn_implementation("eager")

        model.set_attn_implementation("eager")
        self.both(model, mode, treat)

    def test_the_norm_of_the_keys_is_changed(self, make_model):
        def treat(model):
            norm = model.model.layers[1].self_attn.k_norm
            norm.weight.data.mul_(3.0)
            cache = DynamicCache(config=model.config)
            step(model, cache)
            logits = step(model, cache, PROMPTS[:, :1], torch.cat((MASK, MASK.new_ones(3, 1)), dim=1))
            norm.weight.data.div_(3.0)
            return logits

        self.both(make_model("qwen3"), "latent", treat)

    def test_padding_at_negative_positions(self, make_model):
        def treat(model):
            cache, logits = DynamicCache(config=model.config), []
            for start, end in ((0, 9), (9, 300), (300, 301)):
                mask = torch.ones(2, end, dtype=torch.long)
                mask[1, :5] = 0
                positions = (mask.cumsum(-1) - 1)[:, start:end]
                tokens = (torch.arange(2 * (end - start)) * 7 % 97).view(2, -1)
                out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
                logits.append(out.logits[:, -1])
            return torch.stack(logits)

        self.both(make_model("qwen3"), "latent", treat)

    @pytest.mark.parametrize("mode", MODES)
    def test_positions_that_start_anywhere_in_a_static_cache(self, mode, make_model):
        def treat(model):
            cache = StaticCache(config=model.config, max_cache_len=64)
            positions = torch.arange(200, 240)[None]
            first = model(PROMPTS[:1], position_ids=positions[:, :9], past_key_values=cache).logits
            tokens = (torch.arange(20) * 7 % 97)[None]
            second = model(tokens, position_ids=positions[:, 9:29], past_key_values=cache).logits
            return torch.cat((first, second), dim=1)

        self.both(make_model("qwen3"), mode, treat)

    @pytest.mark.parametrize("mode", MODES)
    def test_autocast(self, mode, make_model):
        def treat(model):
            cache = DynamicCache(config=model.config)
            with torch.autocast("cpu", torch.bfloat16):
                model(PROMPTS, past_key_values=cache)
                return model(PROMPTS[:, :1], past_key_values=cache).logits.float()

        self.both(make_model("qwen3"), mode, treat, atol=0.05)

    @pytest.mark.parametrize("mode", COMPILED)
    def test_a_compiled_model_with_a_growing_cache(self, mode, make_model):
        def treat(model):
            torch.compiler.reset()
            compiled = torch.compile(model, backend="eager")
            cache = DynamicCache(config=model.config)
            logits = [compiled(PROMPTS, past_key_values=cache).logits[:, -1:]]
            for number in range(3):
                logits.append(compiled(PROMPTS[:, number : number + 1], past_key_values=cache).logits)
            return torch.cat(logits, dim=1)

        self.both(make_model("qwen3"), mode, treat)

    @pytest.mark.parametrize("mode", MODES)
    def test_training_one_weight_through_a_cache(self, mode, make_model):
        def treat(model):
            model.requires_grad_(False)
            weight = model.model.layers[1].self_attn.v_proj.weight.requires_grad_(True)
            cache = DynamicCache(config=model.config)
            with torch.enable_grad():
                model(PROMPTS[:, :5], past_key_values=cache)
                loss = model(PROMPTS[:, 5:8], past_key_values=cache).logits.square().mean()
                (gradient,) = torch.autograd.grad(loss, weight)
            return gradient

        self.both(make_model("qwen3"), mode, treat)

    def test_a_layer_without_rotation_comes_first(self, make_model):
        """SmolLM3 leaves every fourth layer unrotated."""
        model = make_model("smollm3", num_hidden_layers=8)
        self.both(model, "latent", lambda model: generated(model).float(), layers=(3, 5))

    @pytest.mark.parametrize("mode", MODES)
    def test_a_copy_of_the_model(self, mode, make_model):
        """It can be made after a forward pass with gradients, and knows that it carries an intervention."""
        model = make_model("qwen3")
        with spd.attach(model, uneven_subspace(model), mode=mode):
            with torch.enable_grad():
                model(PROMPTS, labels=PROMPTS, use_cache=False)
            twin = copy.deepcopy(model)
            with pytest.raises(spd.InputError, match="carries an intervention already"):
                spd.attach(twin, uneven_subspace(model), mode="hook")
