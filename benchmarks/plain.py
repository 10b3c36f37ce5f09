"""The whole method as one would write it in an afternoon: the baseline of every end-to-end figure.

Nothing of `spd` is used but a task's examples, prompts and verdicts, so that both do the same work: hooks that keep the
gradients of K and V one example at a time, all rows on the host and one SVD; a dense `out @ P` in hooks; `generate` in
batches of 8 in the order of the prompts; LoRA on texts padded to 256 tokens; greedy answers one prompt at a time.
Models of Llama's kind (`model.model.layers[i].self_attn.k_proj`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from spd.example import Example
from spd.tasks.base import Task

Bases = dict[tuple[int, str], Tensor]
"""U (d, r) by layer and side, "k" or "v"."""


def sites(model: Any) -> dict[tuple[int, str], nn.Module]:
    """The linear layers that make K and V in the middle and in the last layer."""
    n = model.config.num_hidden_layers
    return {
        (layer, side): getattr(model.model.layers[layer].self_attn, f"{side}_proj")
        for layer in sorted({n // 2, n - 1})
        for side in "kv"
    }


def calibrate(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, max_length: int = 256, freeze: bool = False
) -> Bases:
    """The first d / 2 right singular vectors of the centred gradient rows of K and V.

    As loaded, every weight requires a gradient, and each backward pass makes it. With `freeze` none does, and the graph
    begins where K and V of the middle layer are made: one more thing to think of, timed beside the usual way.
    """
    outputs: dict[tuple[int, str], Tensor] = {}
    rows: dict[tuple[int, str], list[Tensor]] = {site: [] for site in sites(model)}

    def keep(site: tuple[int, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.retain_grad()
            outputs[site] = output

        return hook

    model.eval().requires_grad_(not freeze)
    handles = [module.register_forward_hook(keep(site)) for site, module in sites(model).items()]
    for example in examples:
        text = tokenizer(example.text, return_offsets_mapping=True, truncation=True, max_length=max_length)
        tokens = torch.tensor([text["input_ids"]], device=model.device)
        targets = [
            t
            for t, (start, end) in enumerate(text["offset_mapping"])
            if t > 0 and any(start < span_end and span_start < end for span_start, span_end in example.spans)
        ]
        if not targets:
            continue
        log_p = model(input_ids=tokens).logits.log_softmax(dim=-1)
        loss = -log_p[0, [t - 1 for t in targets], tokens[0, targets]].mean()
        loss.backward()
        for site, output in outputs.items():
            assert output.grad is not None
            rows[site].append(output.grad[0].float().cpu())
        model.zero_grad()
    for handle in handles:
        handle.remove()

    bases = {}
    for site, kept in rows.items():
        g = torch.cat(kept)
        _, _, v = torch.linalg.svd(g - g.mean(dim=0), full_matrices=False)
        bases[site] = v[: g.shape[1] // 2].T.contiguous()
    return bases


@contextmanager
def projected(model: Any, bases: Bases) -> Iterator[None]:
    """K <- K U Uᵀ and V <- V U Uᵀ inside the block."""

    def hook_for(p: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, output: output @ p

    handles = []
    for site, module in sites(model).items():
        u = bases[site].to(model.device, model.dtype)
        handles.append(module.register_forward_hook(hook_for(u @ u.T)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 42,
) -> list[list[int]]:
    """Sampled tokens of one completion a prompt, with the token that ends it."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    end = tokenizer.eos_token_id
    completions = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            completions.append(row[: row.index(end) + 1] if end in row else row)
    return completions


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    completions: Sequence[list[int]],
    *,
    epochs: int = 5,
    learning_rate: float = 1e-5,
    lora_dropout: float = 0.05,
    batch_size: int = 4,
    max_length: int = 256,
    shuffle: bool = True,
    seed: int = 42,
) -> tuple[Any, list[float]]:
    """LoRA on prompt + completion; the model of peft, and the loss of every step."""
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=8,
        lora_alpha=8,
        lora_dropout=lora_dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, lora).train()
    tokens = torch.full((len(prompts), max_length), tokenizer.pad_token_id)
    real = torch.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = (tokenizer(prompt)["input_ids"] + completion)[:max_length]
        tokens[row, : len(text)] = torch.tensor(text)
        real[row, : len(text)] = 1
    labels = tokens.masked_fill(real == 0, -100)

    steps_per_epoch = -(-len(prompts) // batch_size)
    trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps_per_epoch // 2, epochs * steps_per_epoch)
    losses, order = [], list(range(len(prompts)))
    for epoch in range(epochs):
        if shuffle:
            random.Random(seed + epoch).shuffle(order)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {"input_ids": tokens[chosen], "attention_mask": real[chosen], "labels": labels[chosen]}
            loss = tuned(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return tuned, losses


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, task: Task, *, limit: int, max_new_tokens: int) -> tuple[list[str], float]:
    """Greedy answers to the first test questions, and the share that is right. Of tasks that have no stop strings."""
    assert not task.stop, f"{task.name}: answers to it would not end where those of spd do"
    model.eval()
    questions = task.test()[:limit]
    answers = []
    for question in questions:
        prompt = tokenizer(question.prompt, return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    verdicts = task.judge(answers, questions)
    return answers, sum(map(bool, verdicts)) / sum(verdict is not None for verdict in verdicts)
