"""Model families the tests run on: the name of the configuration class, and its tiny widths."""

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3": ("Qwen3", WIDTHS | {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": ("Qwen2", WIDTHS | {"num_key_value_heads": 2}),
    "llama": ("Llama", WIDTHS | {"num_key_value_heads": 2}),
    "gemma3": ("Gemma3", WIDTHS | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}),
    "phi3": ("Phi3", WIDTHS | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", WIDTHS),
}
