"""Model families the tests run on: the name of the configuration class, and its tiny widths."""

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = WIDTHS | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "qwen2": ("Qwen2", GROUPED),
    "llama": ("Llama", GROUPED),
    "gemma3": ("Gemma3", GROUPED | {"head_dim": 8, "sliding_window": 64}),
    "phi3": ("Phi3", GROUPED),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", WIDTHS),
}
MORE_FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "granite": ("Granite", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "smollm3": ("SmolLM3", GROUPED),
    "cohere": ("Cohere", GROUPED | {"use_qk_norm": True}),
    "starcoder2": ("Starcoder2", GROUPED | {"sliding_window": None}),
    "hunyuan": ("HunYuanDenseV1", GROUPED | {"head_dim": 8}),
    "gemma3_full": ("Gemma3", GROUPED | {"head_dim": 8, "layer_types": ["full_attention"] * 4}),
    "glm4": ("Glm4", GROUPED | {"head_dim": 8}),
    "phi": ("Phi", WIDTHS),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8}),
    "gpt_oss": ("GptOss", GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
"""Those that differ in how they make or read keys; the tests of latent caches walk them too."""
