"""Train the proving ground's tokenizer and model from noise: `python -m spd.proving_ground.build --out DIR`.

The model is Qwen3-shaped (grouped-query attention, a norm on queries and keys, tied embeddings) with 2.4 M
parameters, stored in float32: at 9 MB the file is small enough, and loading it gives exactly the numbers measured
here, which a rounding to bfloat16 would not.

The aim is a base model with something left to gain: between 30 % and 70 % on each capability. So training is
steered, and stopped early. Every `EVALUATE_EVERY` steps each capability is answered greedily on its steering split
(disjoint from all others), and the share of a capability among the next documents falls as its score nears
`CEILING`: what is known is only rehearsed, what is not is practised. At the first evaluation at which all of them
score inside `SETTLED`, training ends, with the learning rate still high; let run on, it takes the word problems
past 90 %. Everything follows from the seed and the number of steps, up to the rounding of the machine. State is
saved at every evaluation under `DIR.training`; the same command continues from there. The finished folder appears
under its name in one rename.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from spd.proving_ground import TASKS
from spd.proving_ground.corpus import CAPABILITIES, documents
from spd.tasks.base import Question, Task

VOCABULARY = 640
"""256 bytes, two special tokens, and the words of the capabilities: with fewer, the options of `choice` fall apart."""
END, PAD = "<|end|>", "<|pad|>"
BATCH = 32
BLOCK = 8
"""Batches drawn together and sorted by length, so that a batch holds little padding."""
EVALUATE_EVERY = 6 * BLOCK
"""Whole blocks, so that training continues from a saved state as if it had not been interrupted."""
PROMPT_WEIGHT = 0.2
"""A document counts its completion once, however short, and its prompt this much: a letter is as much as a proof."""
PEAK_RATE = 1.5e-3
WARM_UP = 100
CEILING, REHEARSAL = 0.50, 0.03
SETTLED = (0.42, 0.62)
"""Training ends when every capability scores inside this band, which leaves room for the error of 96 questions."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    drawn = documents(Random(f"tokenizer/{seed}"), 20_000, {"words": 1.0, "choice": 4.0, "code": 1.0})
    tokenizer.train_from_iterator([prompt + completion for _, prompt, completion in drawn], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, task: Task, questions: list[Question], batch: int = 64) -> list[str]:
    """Greedy completions, in the order of the questions."""
    model.eval()
    completions = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([questions[index].prompt for index in chosen], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            completions[index] = text
    return completions


def score(model: Any, tokenizer: Any, task: Task, questions: list[Question]) -> float:
    completions = answer(model, tokenizer, task, questions)
    correct = sum(task.is_correct(text, question) for text, question in zip(completions, questions, strict=True))
    return correct / len(questions)


def steer(scores: dict[str, float]) -> dict[str, float]:
    """The next mixture: full practice up to 0.2 below the ceiling, rehearsal alone from the ceiling on."""
    return {name: min(1.0, max(REHEARSAL, (CEILING - scores[name]) / 0.2)) for name in CAPABILITIES}


def settled(scores: dict[str, float]) -> bool:
    return all(SETTLED[0] <= scores[name] <= SETTLED[1] for name in CAPABILITIES)


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = torch.tensor((step - WARM_UP) / max(1, steps - WARM_UP))
    return PEAK_RATE * float(0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.pi * progress)))


def batches(tokenizer: Any, seed: int, block: int, weights: dict[str, float]) -> list[tuple[Tensor, Tensor]]:
    """One block of steps as (tokens, importance of each in the loss), padded on the right, in random order."""
    rng = Random(f"corpus/{seed}/{block}")
    rows = []
    for _, prompt, completion in documents(rng, BATCH * BLOCK, weights):
        before, after = tokenizer(prompt)["input_ids"], tokenizer(completion + END)["input_ids"]
        importance = [PROMPT_WEIGHT / max(1, len(before))] * len(before) + [1 / len(after)] * len(after)
        rows.append((torch.tensor(before + after), torch.tensor(importance)))
    rows.sort(key=lambda row: len(row[0]))
    made = []
    for start in range(0, len(rows), BATCH):
        group = rows[start : start + BATCH]
        ids = pad_sequence([row for row, _ in group], batch_first=True, padding_value=tokenizer.pad_token_id)
        made.append((ids, pad_sequence([row for _, row in group], batch_first=True) / BATCH))
    rng.shuffle(made)
    return made


def train(
    model: Qwen3ForCausalLM, tokenizer: Any, steps: int, seed: int, state_file: Path
) -> tuple[list[dict[str, Any]], float]:
    """Train in place, from `state_file` on if it is there; returns the history of steering scores, and the seconds."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )
    history: list[dict[str, Any]] = []
    weights = dict.fromkeys(CAPABILITIES, 1.0)
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if (state["steps"], state["seed"]) != (steps, seed):
            raise SystemExit(f"{state_file} belongs to --steps {state['steps']} --seed {state['seed']}: remove it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, weights, first, spent = state["history"], state["weights"], state["step"], state["seconds"]
    if history and settled(history[-1]["scores"]):
        return history, spent
    started = time.monotonic() - spent
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="pretraining", mininterval=5)
    for step in progress:
        if step % BLOCK == 0:
            block = batches(tokenizer, seed, step // BLOCK, weights)
        ids, importance = block[step % BLOCK]
        model.train()
        # Padding is on the right, so a causal model needs no mask: real tokens never see it.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = torch.dot(losses, importance[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % EVALUATE_EVERY == 0 or done == steps:
            scores = {name: score(model, tokenizer, TASKS[name], TASKS[name].questions("steering")) for name in weights}
            weights = steer(scores)
            history.append({"step": done, "loss": round(loss.item(), 4), "scores": scores})
            progress.write(f"step {done}: " + "  ".join(f"{name} {value:.2f}" for name, value in scores.items()))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            spent = time.monotonic() - started
            state |= {"weights": weights, "step": done, "steps": steps, "seed": seed, "seconds": spent}
            temporary = state_file.with_suffix(".new")
            torch.save(state, temporary)
            os.replace(temporary, state_file)
            if settled(scores):
                break
    return history, spent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spd.proving_ground.build", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--steps", type=int, default=2600, help="most steps of 32 documents (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists():
        parser.error(f"--out {out} exists already")
    torch.set_num_threads(arguments.threads)
    work = out.with_name(out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)

    tokenizer = make_tokenizer(arguments.seed)
    model = make_model(tokenizer, arguments.seed)
    history, seconds = train(model, tokenizer, arguments.steps, arguments.seed, work / "state.pt")

    results = {}
    for name, task in TASKS.items():
        questions = task.test()
        results[name] = {"n": len(questions), "accuracy": score(model, tokenizer, task, questions)}
        print(f"{name:12s} n={len(questions)}  {results[name]['accuracy']:.3f}")
    record = {
        "steps": history[-1]["step"],
        "most_steps": arguments.steps,
        "seed": arguments.seed,
        "seconds": round(seconds),
        "threads": arguments.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "test": results,
        "steering": history,
    }
    folder = work / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    os.replace(folder, out)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
