"""Tokens per second under `spd.attach`, beside the unprojected model, in one paired run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import nn

import spd
from benchmarks.timing import Timing

NEW_TOKENS, BATCH = 64, 8


def models() -> dict[str, Callable[[], nn.Module]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def qwen2() -> nn.Module:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        return Qwen2ForCausalLM(config).eval()

    return {"proving ground": lambda: spd.load_model("proving-ground", device="cpu")[0], "Qwen2 shape": qwen2}


def random_subspace(model: nn.Module) -> spd.Subspace:
    """Rank d / 2 at all layers: the most work a projection can be as published."""
    from spd.sites import find_sites

    sites = find_sites(model)
    generator = torch.Generator().manual_seed(0)

    def basis(d: int) -> spd.Basis:
        u = torch.linalg.qr(torch.randn(d, d // 2, generator=generator)).Q.contiguous()
        return spd.Basis(u, torch.ones(d, dtype=torch.float64))

    return spd.Subspace(
        {layer: basis(site.width) for layer, site in sites.items()},
        {layer: basis(site.width) for layer, site in sites.items()},
    )


def run(rounds: int, *, quick: bool) -> tuple[list[Table], list[dict[str, Any]]]:
    """Time decoding of the same prompts in every mode in turn; quick: the first model alone."""
    table = Table(
        title=f"Greedy decoding: {BATCH} prompts of 32 tokens, {NEW_TOKENS} new tokens, all layers projected, r = d/2",
        title_justify="left",
    )
    for name in ("model", "parameters", "attach", "tokens/s", "p10 to p90", "ratio", "p10 to p90"):
        table.add_column(name, justify="left" if name in ("model", "attach") else "right", no_wrap=True)
    results = []
    for name, make in list(models().items())[: 1 if quick else None]:
        model = make()
        subspace = random_subspace(model)
        rates: dict[str, list[float]] = {"unprojected": [], "auto": [], "hook": []}
        for number in range(rounds + 1):
            order = list(rates) if number % 2 == 0 else list(reversed(rates))
            for mode in order:
                measured = _rate(model, None if mode == "unprojected" else subspace, mode)
                if number > 0:  # the first round warms up
                    rates[mode].append(measured)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for mode, values in rates.items():
            rate = Timing.of(values)
            ratio = Timing.of([a / b for a, b in zip(values, rates["unprojected"], strict=True)])
            table.add_row(
                name,
                f"{parameters / 1e6:.1f} M",
                mode,
                f"{rate.median:.0f}",
                f"{rate.p10:.0f} to {rate.p90:.0f}",
                f"{ratio.median:.3f}",
                f"{ratio.p10:.3f} to {ratio.p90:.3f}",
            )
            results.append(
                {"model": name, "parameters": parameters, "attach": mode, "tokens_per_second": values}
                | {"ratio_to_unprojected": ratio.median}
            )
        table.add_section()
    return [table], results


def _rate(model: nn.Module, subspace: spd.Subspace | None, mode: str) -> float:
    tokens = torch.randint(8, 500, (BATCH, 32), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    handle = spd.attach(model, subspace, mode=mode) if subspace else None
    try:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings
            )
        return BATCH * NEW_TOKENS / (time.perf_counter() - start)
    finally:
        if handle:
            handle.remove()
