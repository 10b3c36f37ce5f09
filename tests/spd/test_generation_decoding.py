"""The decoding loop: the tokens of `model.generate` for every family and intervention, with less work."""

import warnings
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
import transformers
from families import FAMILIES, MORE_FAMILIES
from peft import LoraConfig, get_peft_model

import spd
from spd.decoding import LEAST_PREFIX, Decoder
from spd.generation import end_tokens, plain_generation_config
from spd.packed import packed
from spd.sampling import Sampling

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, max_new_tokens=14, seed=0)
WARM = Sampling(temperature=0.8, top_k=None, top_p=0.9, max_new_tokens=14, seed=0)


def decoded(model, tokenizer, prompts, sampling=GREEDY, usual=True, **settings):
    """What the loop samples, or without `usual` transformers' own."""
    encoded = [list(tokens) for tokens in tokenizer(prompts)["input_ids"]]
    with plain_generation_config(model, tokenizer) as config:
        decode = Decoder(model, sampling, ends=end_tokens(config), pad=config.pad_token_id, **settings)
        assert decode.usual, "the loop takes every family of the tests"
        decode.usual = usual
        return decode(list(range(len(prompts))), encoded)


@pytest.fixture
def ending(model):
    """A model whose texts end at every twelfth token of the vocabulary, each at another time."""
    model.generation_config.eos_token_id = list(range(0, 300, 12))
    return model


@pytest.mark.parametrize(
    ("family", "sampling"),
    [*((family, GREEDY) for family in FAMILIES | MORE_FAMILIES), ("qwen3", WARM), ("gpt2", WARM), ("gemma3", WARM)],
    ids=lambda value: value if isinstance(value, str) else f"{value.temperature:g}",
)
def test_tokens_are_those_of_transformers(family, sampling, make_model, tokenizer, prompts):
    """Windows of 8 tokens where a family has them, so that they are left behind."""
    windowed = {"sliding_window": 8} if family in ("gemma3", "gemma2", "gpt_oss") else {}
    model = make_model(family, **windowed)
    some = prompts[:9]
    assert decoded(model, tokenizer, some, sampling) == decoded(model, tokenizer, some, sampling, usual=False)


@pytest.mark.parametrize("mode", ["hook", "fold", "latent_v", "latent"])
def test_under_an_intervention(mode, ending, tokenizer, prompts, subspace_of):
    with spd.attach(ending, subspace_of(ending), mode=mode):
        found = decoded(ending, tokenizer, prompts, WARM)
        assert found == decoded(ending, tokenizer, prompts, WARM, usual=False)
    assert len({len(tokens) for tokens in found}) > 1, "rows end at different times"


def test_with_an_adapter(ending, tokenizer, prompts):
    tuned = get_peft_model(ending, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    found = decoded(tuned, tokenizer, prompts)
    assert found == decoded(tuned, tokenizer, prompts, usual=False)
    with tuned.disable_adapter():
        assert found != decoded(tuned, tokenizer, prompts)


def test_rows_that_have_ended_leave_and_the_context_follows(ending, tokenizer, prompts):
    rows, contexts = [], []
    counting = ending.model.layers[0].register_forward_hook(lambda module, args, output: rows.append(len(args[0])))

    @contextmanager
    def around(indices):
        contexts.append(indices)
        yield

    found = decoded(ending, tokenizer, prompts, WARM, around=around)
    counting.remove()
    assert rows[0] == len(prompts)
    assert rows == sorted(rows, reverse=True)
    for step, count in enumerate(rows):
        alive = sum(len(tokens) > step for tokens in found)
        assert alive <= count < max(alive / (1 - 1 / 8), alive + 1) + 1
    assert len(contexts) == len(set(rows)) > 2
    assert [len(each) for each in contexts] == sorted(set(rows), reverse=True)
    assert all(set(later) < set(earlier) for earlier, later in pairwise(contexts))


@pytest.mark.parametrize("usual", [True, False])
def test_a_router_gives_each_row_its_own(usual, ending, tokenizer, prompts, subspace_of, monkeypatch):
    """Whichever rows are left: the tokens are those of each route by itself."""
    init = Decoder.__init__

    def choosing(self, *args, **settings):
        init(self, *args, **settings)
        self.usual = usual

    monkeypatch.setattr(Decoder, "__init__", choosing)
    subspace = subspace_of(ending)
    router = spd.Router({"it": subspace, "less": subspace.truncate(3)})
    routes = [("it", None, "less")[index % 3] for index in range(len(prompts))]
    settings = {"max_new_tokens": 12, "progress": False, "batch_size": 10}
    with spd.attach(ending, router):
        together = router.generate(ending, tokenizer, prompts, routes=routes, **settings)
    for name, each in ((None, None), *router.subspaces.items()):
        with spd.attach(ending, each, mode="hook") if each else nullcontext():
            alone = spd.generate(ending, tokenizer, prompts, **settings)
        for index, route in enumerate(routes):
            if route == name:
                assert together[index].tokens == alone[index].tokens


@pytest.mark.parametrize(("family", "mode"), [("qwen3", None), ("gpt2", None), ("qwen3", "latent"), ("phi3", "hook")])
def test_what_all_prompts_begin_with_is_run_once(family, mode, make_model, tokenizer, prompts, subspace_of):
    model = make_model(family)
    shots = "Question: how many apples are there? Answer: there are 1234 apples #### 1234\n"
    long = [shots + prompt for prompt in prompts]
    seen = []
    with spd.attach(model, subspace_of(model), mode=mode) if mode else nullcontext():
        expected = decoded(model, tokenizer, long, usual=False)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        assert decoded(model, tokenizer, long) == expected
    encoded = tokenizer(long)["input_ids"]
    assert seen[0][0] == 1 and seen[0][1] >= max(LEAST_PREFIX, len(tokenizer(shots)["input_ids"]) - 1)
    assert seen[1] == (len(long), max(map(len, encoded)) - seen[0][1])


def test_a_prompt_that_is_all_shared_keeps_its_last_token(model, tokenizer):
    whole = "how many apples are there? " * 3
    expected = decoded(model, tokenizer, [whole, whole, whole + "many"], usual=False)
    assert decoded(model, tokenizer, [whole, whole, whole + "many"]) == expected


def test_windows_share_nothing(make_model, tokenizer):
    """Padding behind a shared beginning would take places in a window."""
    model = make_model("gemma3", sliding_window=8)
    long = ["how many apples are there? " * 3 + "very " * count for count in range(1, 6)]
    assert decoded(model, tokenizer, long) == decoded(model, tokenizer, long, usual=False)


def test_a_window_that_the_cache_does_not_know_of_shares_nothing(tokenizer):
    """GPT-Neo's attention keeps its own."""
    widths = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 512, "window_size": 8}
    kinds = [[["global", "local"], 2]]
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(vocab_size=len(tokenizer), attention_types=kinds, **widths)
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    long = ["how many apples are there? " * 3 + "very " * count for count in range(1, 6)]
    model.generation_config.eos_token_id = 0
    found = decoded(model, tokenizer, long)
    assert found == decoded(model, tokenizer, long, usual=False)
    assert found == [decoded(model, tokenizer, [each])[0] for each in long]


def test_where_padding_is_taken_for_text_there_is_none(tokenizer, prompts):
    """RecurrentGemma's recurrent layers run over it."""
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    widths |= {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}
    torch.manual_seed(0)
    model = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **widths)
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.ndim > 1 else parameter.data.add_(0.1)
    model.get_input_embeddings().weight.data[0] = 1.0  # of padding
    batches = []
    generate = model.generate
    model.generate = lambda **settings: batches.append(settings["attention_mask"]) or generate(**settings)
    settings = {"max_new_tokens": 8, "progress": False, "seed": 1}
    alone = spd.generate(model, tokenizer, prompts, batch_size=1, **settings)
    batches.clear()
    assert spd.generate(model, tokenizer, prompts, **settings) == alone
    trial, made = batches[:2], batches[2:]
    assert [len(mask) for mask in trial] == [1, 2], "one trial"
    assert all(bool(mask.all()) for mask in made) and 1 < len(made) < len(prompts), "rows of one length together"
    batches.clear()
    assert spd.generate(model, tokenizer, prompts, **settings) == alone
    assert len(batches) == len(made), "no further trial"


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_logits_that_are_not_finite_are_refused(sampling, usual, model, tokenizer, prompts):
    def spoil(module, args, output):
        output.logits[..., 5] = float("-inf")  # a suppressed token is none
        output.logits[1:2] += value

    value = 0.0
    model.register_forward_hook(spoil)
    decoded(model, tokenizer, prompts[:3], sampling, usual)
    value = float("nan")
    with pytest.raises(
        spd.InputError, match=r"^model: expected finite logits, got .* for prompt 1; .*in torch.float32"
    ):
        decoded(model, tokenizer, prompts[:3], sampling, usual)


@pytest.mark.parametrize("usual", [True, False])
def test_weights_of_nan_are_refused(usual, model, tokenizer, prompts):
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(spd.InputError, match=r"^model: expected finite logits, got .* for prompt \d; "):
        decoded(model, tokenizer, prompts[:3], WARM, usual)


@pytest.mark.parametrize("usual", [True, False])
def test_what_comes_behind_an_end_may_be_anything(usual, ending, tokenizer, prompts):
    expected = decoded(ending, tokenizer, prompts, WARM, usual)
    spoilt = []

    def spoil(module, args, kwargs, output):
        ended = torch.isin(kwargs["input_ids"][:, -1], torch.arange(0, 300, 12))
        if kwargs["input_ids"].shape[1] == 1:
            output.logits[ended] = float("nan")
            spoilt.append(int(ended.sum()))

    ending.register_forward_hook(spoil, with_kwargs=True)
    assert decoded(ending, tokenizer, prompts, WARM, usual) == expected
    assert any(spoilt)


def test_a_model_of_another_kind_is_left_to_transformers(ending, tokenizer, prompts, monkeypatch):
    expected = spd.generate(ending, tokenizer, prompts, max_new_tokens=12, progress=False)
    inner = ending.forward
    monkeypatch.setattr(
        ending, "forward", lambda *args, **kwargs: inner(*args, **kwargs)
    )  # a signature that says little
    called = []
    generate = ending.generate
    monkeypatch.setattr(ending, "generate", lambda **kwargs: called.append(1) or generate(**kwargs))
    assert spd.generate(ending, tokenizer, prompts, max_new_tokens=12, progress=False) == expected
    assert called


def test_stop_strings_end_a_text_early_and_cut_it_at_the_same_place(model, tokenizer, prompts, tmp_path):
    settings = {"max_new_tokens": 40, "progress": False, "temperature": 1.0, "top_p": 1.0}
    whole = spd.generate(model, tokenizer, prompts, **settings)
    stop = [sorted({each.completion[5] for each in whole})[0], whole[0].completion[8:10], "nowhere"]
    short = spd.generate(model, tokenizer, prompts, stop=stop, out=tmp_path / "g.jsonl", **settings)

    def cut(text):
        return min((text.split(each, 1)[0] for each in stop), key=len)

    assert [cut(each.completion) for each in short] == [cut(each.completion) for each in whole]
    stopped = [any(each in generation.completion for each in stop) for generation in short]
    assert any(stopped)
    assert all(generation.finished for generation, came in zip(short, stopped, strict=True) if came)
    assert sum(len(each.tokens) for each in short) < sum(len(each.tokens) for each in whole)
    with pytest.raises(spd.InputError, match="another stop"):
        spd.generate(model, tokenizer, prompts, out=tmp_path / "g.jsonl", **settings)


@pytest.mark.parametrize("stop", ["text", [""], [5]])
def test_bad_stops_are_refused(stop, model, tokenizer, prompts):
    with pytest.raises(spd.InputError, match="stop"):
        spd.generate(model, tokenizer, prompts, stop=stop, progress=False)


def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, prompts, tmp_path):
    expected = spd.generate(model, tokenizer, prompts, max_new_tokens=8, progress=False)

    def too_much(module, args, kwargs):
        if len(kwargs["input_ids"]) > 6:
            raise MemoryError("no room, on purpose")

    handle = model.register_forward_pre_hook(too_much, with_kwargs=True)
    settings = {"max_new_tokens": 8, "progress": False, "batch_size": 20, "out": tmp_path / "g.jsonl"}
    with pytest.warns(UserWarning, match="do not fit in memory") as said:
        assert spd.generate(model, tokenizer, prompts, **settings) == expected
    assert [str(each.message).rpartition(" ")[2] for each in said] == ["10", "5"]
    with pytest.raises(spd.InputError, match="fewer would give other bytes"):
        spd.generate(model, tokenizer, prompts, max_new_tokens=8, progress=False, deterministic=True)
    handle.remove()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_deterministic_bytes_depend_on_neither_batch_size_nor_threads(make_model, tokenizer, prompts, tmp_path):
    """Wide enough that the sums of a matrix product are split over threads."""
    model = make_model("qwen3", hidden_size=256, intermediate_size=640, num_attention_heads=8, num_key_value_heads=4)
    many = [f"{prompt} {number}" for number in range(2) for prompt in prompts]
    found, threads = [], torch.get_num_threads()
    for batch_size, count in ((1, 1), (7, 2), (64, 3)):
        out = tmp_path / str(batch_size) / "g.jsonl"
        torch.set_num_threads(count)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                spd.generate(
                    *(model, tokenizer, many),
                    **{"out": out, "batch_size": batch_size, "max_new_tokens": 6, "deterministic": True},
                    progress=False,
                )
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        found.append(files(out.parent))
    assert found[0] == found[1] == found[2]
    assert b'"deterministic": true' in found[0]["g.settings.json"]


def test_where_bytes_cannot_be_promised_it_says_so(model, tokenizer, prompts):
    with pytest.warns(UserWarning, match="float32 alone; the model is in bfloat16"):
        spd.generate(
            model.to(torch.bfloat16), tokenizer, prompts[:2], max_new_tokens=2, deterministic=True, progress=False
        )


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_packed_weights_give_the_same_logits_and_leave_no_trace(family, make_model, monkeypatch):
    wide = {"n_embd": 512, "n_head": 8} if family == "gpt2" else {"hidden_size": 512, "intermediate_size": 1024}
    model = make_model(family, **wide)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    tokens = torch.arange(24).reshape(3, 8)
    with torch.inference_mode():
        expected = model(tokens).logits
        with packed(model):
            rewritten = [name for name, module in model.named_modules() if "forward" in module.__dict__]
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert bool(rewritten) == (family == "qwen2"), "the linear layers of GPT-2 are of another kind"
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    monkeypatch.setattr("spd.packed.LARGEST", 2**20)
    with packed(model):
        assert not any("forward" in module.__dict__ for module in model.modules()), "too large for a second copy"
