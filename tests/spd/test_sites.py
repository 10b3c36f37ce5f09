"""Where K and V are found: checked against what each family puts into its cache."""

import pytest
import torch
from families import FAMILIES
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import spd
from spd.sites import choose_layers, find_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_values_read_at_a_site_are_the_values_in_the_cache(family, make_model, tokenizer):
    model = make_model(family)
    sites = find_sites(model)
    assert list(sites) == [0, 1, 2, 3]
    seen = {}
    handles = [
        site.v.module.register_forward_hook(
            lambda module, args, output, site=site: seen.__setitem__(site.layer, site.v.read(output))
        )
        for site in sites.values()
    ]
    tokens = tokenizer(["Question: how many?"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    for layer, site in sites.items():
        cached = cache.layers[layer].values  # (1, heads, T, head_dim)
        assert site.width == cached.shape[1] * cached.shape[3]
        torch.testing.assert_close(seen[layer], cached.transpose(1, 2).flatten(2), rtol=0, atol=0)


def test_keys_read_from_the_fused_layer_of_gpt2_are_the_keys_in_the_cache(make_model, tokenizer):
    model = make_model("gpt2")  # no rotary embedding and no norm stand between the layer and the cache
    site = find_sites(model)[1]
    seen = []
    site.k.module.register_forward_hook(lambda module, args, output: seen.append(site.k.read(output)))
    tokens = tokenizer(["Question: how many?"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    torch.testing.assert_close(seen[0], cache.layers[1].keys.transpose(1, 2).flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_changes_only_what_was_named(family, make_model):
    site = find_sites(make_model(family))[0]
    features = getattr(site.k.module, "out_features", None) or site.k.module.nf
    output = torch.randn(2, 3, features)
    untouched = output.clone()
    written = site.k.write(output, torch.zeros(2, 3, site.width))
    assert not site.k.read(written).any()
    if site.k.fused:
        torch.testing.assert_close(site.v.read(written), site.v.read(untouched), rtol=0, atol=0)
        assert (written == 0).sum() == 2 * 3 * site.width
    torch.testing.assert_close(output, untouched, rtol=0, atol=0)


def test_layers_are_chosen_as_published(make_model):
    sites = find_sites(make_model("llama", num_hidden_layers=5))
    assert choose_layers(sites, "paper", 5) == [2, 4]
    assert choose_layers(sites, "all", 5) == [0, 1, 2, 3, 4]
    assert (choose_layers(sites, "middle", 5), choose_layers(sites, "last", 5)) == ([2], [4])
    assert choose_layers(sites, [3, 0], 5) == [0, 3]
    assert choose_layers(find_sites(make_model("llama", num_hidden_layers=1)), "paper", 1) == [0]


def test_a_published_layer_that_cannot_be_reached_is_an_error_not_another_layer(make_model):
    sites = find_sites(make_model("llama", num_hidden_layers=5))
    with pytest.raises(spd.InputError, match="layer 4"):
        choose_layers({layer: sites[layer] for layer in (0, 1, 2)}, "paper", 5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [("midle", "'midle'"), ([], "empty"), ([4], "layer 4"), ([-1], "layer -1"), ([0, 0], "twice"), (["0"], "'0'")],
)
def test_impossible_layers_are_refused(layers, message, model):
    with pytest.raises(spd.InputError, match=message):
        choose_layers(find_sites(model), layers, 4)


def test_models_without_reachable_sites_are_refused_by_name():
    latent = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    )
    with pytest.raises(spd.InputError, match="DeepseekV2Attention"):
        find_sites(latent)
    encoder = BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(spd.InputError, match="BertModel"):
        find_sites(encoder)
    translator = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, num_layers=1, num_heads=2))
    with pytest.raises(spd.InputError, match="encoder-decoder"):
        find_sites(translator)
