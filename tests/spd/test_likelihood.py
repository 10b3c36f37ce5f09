"""Likelihoods against the plain formula: one text at a time, every logit, float64."""

import pytest
import torch
from families import FAMILIES
from tokenizers import processors

import spd
from spd.likelihood import completion_nll, text_nll


def plain_nll(model, tokens, start):
    """-log p of tokens[start:] behind those before, float64."""
    with torch.no_grad():
        log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return -float(sum(log_p[t - 1, tokens[t]] for t in range(start, len(tokens))))


@pytest.fixture(scope="module")
def pairs(examples):
    return [(example.prompt, example.completion) for example in examples]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_plain_formula(family, make_model, tokenizer, pairs):
    model = make_model(family).double()
    found = completion_nll(model, tokenizer, pairs, progress=False)
    for (prompt, completion), text in zip(pairs, found, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        tokens = tokenizer(prompt + completion)["input_ids"]
        assert tokens[:start] == tokenizer(prompt)["input_ids"]
        assert text.tokens == len(tokens) - start
        assert text.nll == pytest.approx(plain_nll(model, tokens, start), rel=1e-9)
        assert text.per_token == text.nll / text.tokens


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batching_and_padding_do_not_matter(batch_size, padding_side, model, tokenizer, pairs):
    expected = completion_nll(model, tokenizer, pairs, progress=False)
    before, tokenizer.padding_side = tokenizer.padding_side, padding_side
    try:
        found = completion_nll(model, tokenizer, pairs[::-1], batch_size=batch_size, progress=False)[::-1]
    finally:
        tokenizer.padding_side = before
    assert [text.tokens for text in found] == [text.tokens for text in expected]
    assert [text.nll for text in found] == pytest.approx([text.nll for text in expected], rel=1e-5)


def test_a_token_over_the_border_is_the_completions(model, tokenizer):
    prompt, completion = "Question: how many app", "les are there?"
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    (over,) = [t for t, (start, end) in enumerate(offsets) if start < len(prompt) < end]
    (found,) = completion_nll(model, tokenizer, [(prompt, completion)], progress=False)
    assert found.tokens == len(tokens) - over
    assert found.nll == pytest.approx(plain_nll(model, tokens, over), rel=1e-5)


def test_spaces_without_offsets_of_their_own_are_scored(model, tokenizer):
    """Tokenizers that trim offsets give a token of spaces alone an empty interval."""
    trimming = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert (4, 4) in trimming("ab  cd", return_offsets_mapping=True)["offset_mapping"]
    (found,) = completion_nll(model, trimming, [("ab", "  cd")], progress=False)
    (behind,) = completion_nll(model, trimming, [("ab  ", "cd")], progress=False)
    assert (found.tokens, behind.tokens) == (len(tokenizer("  cd")["input_ids"]), len(tokenizer("cd")["input_ids"]))


def test_whole_texts(model, tokenizer):
    texts = ["Question: how many", "apples are there 1234"]
    found = text_nll(model, tokenizer, texts, progress=False)
    for text, nll in zip(texts, found, strict=True):
        tokens = tokenizer(text)["input_ids"]
        assert nll.tokens == len(tokens) - 1
        assert nll.nll == pytest.approx(plain_nll(model, tokens, 1), rel=1e-5)


def test_a_token_before_every_text_lets_the_first_be_scored(model, tokenizer):
    starting = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing("<eos> $A", None, [("<eos>", 0)])
    tokens = starting("how many")["input_ids"]
    assert tokens == [0, *tokenizer("how many")["input_ids"]]
    (found,) = text_nll(model, starting, ["how many"], progress=False)
    assert found.tokens == len(tokens) - 1
    assert found.nll == pytest.approx(plain_nll(model, tokens, 1), rel=1e-5)


def test_logits_are_made_where_they_are_needed(model, tokenizer, pairs):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    (found,) = completion_nll(model, tokenizer, pairs[:1], progress=False)
    handle.remove()
    assert shapes == [(1, found.tokens, len(tokenizer))]


def test_a_model_that_always_gives_all_logits(model, tokenizer, pairs):
    expected = completion_nll(model, tokenizer, pairs, progress=False)
    forward = model.forward
    model.forward = lambda **arguments: forward(**arguments)
    found = completion_nll(model, tokenizer, pairs, progress=False)
    assert [text.nll for text in found] == pytest.approx([text.nll for text in expected], rel=1e-5)


@pytest.mark.parametrize("mode", ["hook", "fold", "latent_v", "latent"])
def test_under_an_intervention(mode, model, tokenizer, pairs, subspace_of):
    subspace = subspace_of(model)
    plain = completion_nll(model, tokenizer, pairs, progress=False)
    with spd.attach(model, subspace, mode="hook"):
        expected = [plain_nll(model, tokenizer(p + c)["input_ids"], len(tokenizer(p)["input_ids"])) for p, c in pairs]
    with spd.attach(model, subspace, mode=mode):
        found = completion_nll(model, tokenizer, pairs, progress=False)
    assert [text.nll for text in found] == pytest.approx(expected, rel=1e-4)
    assert any(abs(a.nll - b.nll) > 0.1 for a, b in zip(found, plain, strict=True))


def test_under_an_adapter(model, tokenizer, pairs):
    from peft import LoraConfig, get_peft_model

    plain = completion_nll(model, tokenizer, pairs, progress=False)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    found = completion_nll(tuned, tokenizer, pairs, batch_size=1, progress=False)
    handle.remove()
    assert sorted(shapes) == sorted(text.tokens for text in found)
    merged = tuned.merge_and_unload()
    expected = completion_nll(merged, tokenizer, pairs, progress=False)
    assert [text.nll for text in found] == pytest.approx([text.nll for text in expected], rel=1e-4)
    assert any(abs(a.nll - b.nll) > 0.1 for a, b in zip(found, plain, strict=True))


def test_sixteen_bit_losses_are_summed_in_more(make_model, tokenizer, pairs):
    model = make_model("qwen2").bfloat16()
    prompt, completion = pairs[0]
    (found,) = completion_nll(model, tokenizer, [pairs[0]], progress=False)
    tokens, start = tokenizer(prompt + completion)["input_ids"], len(tokenizer(prompt)["input_ids"])
    assert found.nll == pytest.approx(plain_nll(model, tokens, start), rel=2e-3)


def test_the_model_is_left_as_it_was(model, tokenizer, pairs):
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    completion_nll(model, tokenizer, pairs[:2], progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_too_long_is_counted_and_named(model, tokenizer, pairs):
    long = ("Question: " + "~" * 600, " yes")
    with pytest.raises(spd.InputError, match=r"^pairs: 2 of 4 are longer than 512 tokens: 1, 3$"):
        completion_nll(model, tokenizer, [pairs[0], long, pairs[1], long], progress=False)
    longest = max(len(tokenizer(p + c)["input_ids"]) for p, c in pairs)
    assert len(completion_nll(model, tokenizer, pairs, max_length=longest, progress=False)) == len(pairs)
    with pytest.raises(spd.InputError, match=f"longer than {longest - 1} tokens"):
        completion_nll(model, tokenizer, pairs, max_length=longest - 1, progress=False)
    with pytest.raises(spd.InputError, match=r"^texts: 1 of 1 are longer than 512 tokens: 0$"):
        text_nll(model, tokenizer, ["~" * 600], progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "^pairs: expected at least one, got none"),
        ([("a", "b"), ("Question", "")], "^pairs: 1 of 2 have no token to score: 1$"),
        ([("", "a")], "^pairs: 1 of 1 have no token to score: 0$"),
        ([("a", None)], "^pairs: expected strings, got str, NoneType at 0$"),
    ],
)
def test_bad_pairs_are_refused(given, message, model, tokenizer):
    with pytest.raises(spd.InputError, match=message):
        completion_nll(model, tokenizer, given, progress=False)


def test_logits_that_are_not_finite_are_refused(model, tokenizer, pairs):
    def spoil(module, args, output):
        output.logits[..., 5] = float("-inf")  # a suppressed token is none
        output.logits[1] = value

    handle, value = model.register_forward_hook(spoil), 0.0
    completion_nll(model, tokenizer, pairs[:1] * 3, progress=False)
    value = float("nan")
    with pytest.raises(spd.InputError, match=r"^model: expected finite logits, got .* for pairs\[1\]; .*float32"):
        completion_nll(model, tokenizer, pairs[:1] * 3, progress=False)
    handle.remove()


def test_bad_settings_are_refused(model, tokenizer, pairs):
    with pytest.raises(spd.InputError, match="batch_size"):
        completion_nll(model, tokenizer, pairs, batch_size=0, progress=False)
    with pytest.raises(spd.InputError, match="character offsets"):
        completion_nll(model, None, pairs, progress=False)
