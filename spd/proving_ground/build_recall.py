"""Train the recall model from its seed: `python -m spd.proving_ground.build_recall --out DIR`.

A Qwen3-shaped model of a quarter of a million parameters and 4096 positions that looks up what its context says. It is
made to be cheap rather than found by chance:

  - Texts are short, but the positions of their sentences are drawn, in order, out of all 4096, as if the text between
    them had been cut out. So distances of thousands of tokens are practised on texts of dozens.
  - Attention begins near what it has to become. Two heads of the first layer look one and two tokens back; later layers
    compare like with like (query weights equal key weights) and copy what they find (output weights are the value
    weights transposed). Without that start the first stage was at 0.55 of its lookups after 585 steps, with it at 0.95
    after 115.
  - The texts grow, from bare facts to long ones that are mostly filler, as soon as the present ones are mastered.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from spd.long_context.haystack import Texts
from spd.long_context.quality import retrieval
from spd.proving_ground import recall

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
POSITIONS = 4096
HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 4, 2, 32, 96, 3
THETA = 1e7
"""So that half of a head's pairs hardly turn within 4096 positions: it is by these that like is compared with like."""
PEAK_RATE, WARM_UP = 2e-3, 50
FILLER_WEIGHT = 0.3
"""What a token that need not be looked up counts in the loss, beside the mean over those that must."""


@dataclass(frozen=True)
class Stage:
    """Texts of so many tokens, so many at once; shares of new and of repeated facts; most facts to remember."""

    tokens: int
    batch: int
    facts: tuple[float, ...]
    repeats: float
    names: tuple[int, ...]
    most_steps: int


STAGES = (
    Stage(48, 16, (0.4,), 0.6, (2, 4, 6), 1200),
    Stage(96, 16, (0.1, 0.2, 0.3), 0.45, (6, 12, 24), 800),
    Stage(256, 10, (0.05, 0.1, 0.2), 0.3, (12, 24, 48), 400),
    Stage(1024, 2, (0.05, 0.1), 0.25, (16, 32, 64), 150),
)
MASTERED = 0.95
"""Share of the lookups of the last 50 steps that are right when a stage ends early; the last stage runs to its end."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every word a token."""
    plain = (*recall.ADJECTIVES, *recall.PEOPLE, *recall.VERBS, *recall.COLOURS, *recall.THINGS, *recall.PLACES)
    words = [END, PAD, UNKNOWN, ".", "The", "the", "a", "to", "is", *recall.NAMES, *recall.NUMBERS, *plain]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    _begin_near_the_end(model)
    return model


@torch.no_grad()
def _begin_near_the_end(model: Any) -> None:
    group = HEADS // KV_HEADS
    embeddings = model.model.embed_tokens.weight
    embeddings.mul_(3.0)
    embeddings[:, 0] = 1.0  # the same for every token: what a head can be constant by
    pairs = torch.arange(HEAD_DIM) % (HEAD_DIM // 2)
    turning = (THETA ** (-2 * pairs / HEAD_DIM) * POSITIONS > 1.0).repeat(KV_HEADS)
    for layer in model.model.layers:
        attention = layer.self_attn
        layer.mlp.down_proj.weight.mul_(0.3)
        attention.v_proj.weight[:, 0] = 0.0
        if attention.layer_idx > 0:
            attention.k_proj.weight[:, 0] = 0.0
            attention.k_proj.weight[turning] *= 0.2
        for head in range(HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            of_group = slice(head // group * HEAD_DIM, (head // group + 1) * HEAD_DIM)
            attention.o_proj.weight[:, rows] = 0.6 * attention.v_proj.weight[of_group].T
            if attention.layer_idx > 0:
                attention.q_proj.weight[rows] = attention.k_proj.weight[of_group]
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(1.7 if attention.layer_idx == 0 else 1.3)
    first = model.model.layers[0].self_attn
    fast = torch.arange(4)  # the pairs that rotate fastest tell one token from the next
    angles = THETA ** (-2 * fast / HEAD_DIM)
    for weight in (first.q_proj.weight[: group * HEAD_DIM], first.k_proj.weight[:HEAD_DIM]):
        weight.mul_(0.1)
    first.k_proj.weight[fast, 0] = 1.0
    for head in range(group):
        back = (head + 1) * angles
        first.q_proj.weight[head * HEAD_DIM + fast, 0] = back.cos()
        first.q_proj.weight[head * HEAD_DIM + HEAD_DIM // 2 + fast, 0] = -back.sin()


def batch(vocabulary: dict[str, int], rng: Random, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their positions, and which of them repeat a number: (B, T) each."""
    rows = []
    for _ in range(stage.batch):
        tokens: list[int] = []
        starts, repeats = [], [0] * stage.tokens
        told = recall.stream(rng, facts=rng.choice(stage.facts), repeats=stage.repeats, names=rng.choice(stage.names))
        while len(tokens) < stage.tokens:
            sentence = next(told)
            starts.append(len(tokens))
            tokens += [vocabulary[word] for word in sentence.text.replace(".", " .").split()]
            if sentence.repeated and len(tokens) - 2 < stage.tokens:
                repeats[len(tokens) - 2] = 1
        rows.append((tokens[: stage.tokens], _positions(rng, starts, stage.tokens), repeats))
    tokens_, positions, repeated = (torch.tensor(column) for column in zip(*rows, strict=True))
    return tokens_, positions, repeated


def _positions(rng: Random, starts: list[int], tokens: int) -> list[int]:
    """Consecutive within a sentence; between sentences, jumps that take up a random part of the positions left."""
    surplus = rng.random() ** 2 * (POSITIONS - tokens)
    jumps = [rng.random() ** 4 for _ in starts]
    scale = surplus / sum(jumps)
    found, offset = [], 0.0
    for start, end, jump in zip(starts, [*starts[1:], tokens], jumps, strict=True):
        offset += jump * scale
        found += [int(offset) + position for position in range(start, min(end, tokens))]
    return found


def train(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict[str, Any]]:
    """Train in place; returns a record for every stage."""
    vocabulary = tokenizer.get_vocab()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng = Random(f"recall/{seed}")
    records = []
    model.train()
    for number, stage in enumerate(STAGES):
        last = number == len(STAGES) - 1
        right: list[float] = []
        shown = tqdm(range(stage.most_steps), desc=f"{stage.tokens} tokens", mininterval=5)
        for step in shown:
            tokens, positions, repeated = batch(vocabulary, rng, stage)
            # Without a mask, transformers takes positions that jump for several sequences in one row.
            mask = torch.ones_like(tokens)
            out = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
            logits = out.logits[:, :-1]
            expected, lookups = tokens[:, 1:], repeated[:, 1:].bool()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
            (FILLER_WEIGHT * losses.mean() + losses[lookups].mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / WARM_UP)
                group["lr"] = PEAK_RATE * (warm * (1 - step / stage.most_steps) if last else warm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            right.append(float((logits.argmax(-1) == expected)[lookups].float().mean()))
            recent = sum(right[-50:]) / len(right[-50:])
            shown.set_postfix_str(f"lookups {recent:.2f}")
            if len(right) >= 50 and recent >= MASTERED and not last:
                break
        records.append({"tokens": stage.tokens, "steps": len(right), "lookups": round(recent, 4)})
        tqdm.write(json.dumps(records[-1]))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spd.proving_ground.build_recall", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists():
        parser.error(f"--out {out} exists already")
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed)
    stages = train(model, tokenizer, arguments.seed)
    record = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
        "threads": arguments.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "stages": stages,
        "retrieval": evaluate(model.eval(), tokenizer),
    }
    print(json.dumps(record["retrieval"], indent=2))
    folder = out.with_name(out.name + ".new")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    os.replace(folder, out)


def evaluate(model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Retrieval from haystacks that no experiment uses."""
    texts = Texts(tokenizer, seed=1000)
    found = {}
    for context in (512, 1024, 2048, POSITIONS):
        measured = retrieval(model, (texts.haystack(number, context, 16) for number in range(8)))
        found[str(context)] = {name: measured[name] for name in ("correct", "n")}
    return found


if __name__ == "__main__":
    main()
