"""`python processes.py FOLDER`: calibrations by several processes at once, each process's results in a file.

The processes are forked, so that the libraries are imported once; they meet in a file. FOLDER holds a checkpoint and
`examples.json`; what rank R of N did in JOB goes to FOLDER/JOB-N-R.pt.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import carry_out, meet
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import spd
from spd import distributed, gradients

Found = dict[str, Any]
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()


def examples() -> list[spd.Example]:
    read = json.loads((FOLDER / "examples.json").read_text())
    return [spd.Example(prompt, completion, [tuple(span) for span in spans]) for prompt, completion, spans in read]


def found(calibrate: Callable[[], spd.Subspace]) -> Found:
    """The bases and what is said of them, or the error."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subspace = calibrate()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    bases = {
        f"{side}{layer}": (basis.basis, basis.singular_values)
        for side in "kv"
        for layer, basis in subspace.side(side).items()
    }
    warned = [str(each.message) for each in caught if str(each.message).startswith("calibrate")]
    return {"bases": bases, "provenance": subspace.provenance, "warned": warned}


def calibrated(model: nn.Module, tokenizer: Any, given: list[spd.Example], **settings: Any) -> Found:
    return found(lambda: spd.calibrate(model, tokenizer, given, **({"progress": False, "layers": [1, 3]} | settings)))


def plain() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    return calibrated(model, tokenizer, examples(), batch_size=3)


def one_batch() -> Found:
    """Fewer examples than processes, and one that has no span."""
    model, tokenizer = spd.load_model(FOLDER)
    return calibrated(model, tokenizer, [*examples()[:2], spd.Example("no", " span")], rank=3)


def poisoned() -> Found:
    """The gradient of one example, which one process has, is NaN."""
    model, tokenizer = spd.load_model(FOLDER)
    poison = tokenizer("~")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    given = examples()
    given[4] = spd.Example("Question ~", " answer", [(11, 17)])
    return calibrated(model, tokenizer, given, batch_size=3)


def no_examples_in_one() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    return calibrated(model, tokenizer, [] if distributed.rank() == 1 else examples())


def other_examples() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    return calibrated(model, tokenizer, examples()[distributed.rank() :])


def other_settings() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    return calibrated(model, tokenizer, examples(), batch_size=3 + distributed.rank())


def other_weights() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += distributed.rank()
    return calibrated(model, tokenizer, examples())


def a_bug_in_one() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    if distributed.rank() == 1:
        model.forward = None
    return calibrated(model, tokenizer, examples())


def sharded_model() -> tuple[Any, Any]:
    model, tokenizer = spd.load_model(FOLDER)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model), tokenizer


def sharded() -> Found:
    """Four batches of five, so that with three processes two of them only take part in the last passes."""
    model, tokenizer = sharded_model()
    model.train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    one = calibrated(model, tokenizer, examples(), batch_size=5)
    again = calibrated(model, tokenizer, examples()[:1], rank=3)
    kept = {
        "flags": flags == [parameter.requires_grad for parameter in model.parameters()],
        "training": all(module.training for module in model.modules()),
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "hooks": [name for name, module in model.named_modules() if name.endswith("_proj") and module._forward_hooks],
    }
    return one | {"rows_of_one": again["provenance"]["rows"], "kept": kept}


def sharded_after_training() -> Found:
    """A training step first: what it gathered then required gradients."""
    model, tokenizer = sharded_model()
    tokens = torch.tensor([tokenizer("Question: how many?")["input_ids"]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()
    result = calibrated(model, tokenizer, examples(), batch_size=5)
    return result | {"gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None]}


def sharded_and_checkpointed() -> Found:
    model, tokenizer = sharded_model()
    return calibrated(model, tokenizer, examples(), batch_size=5, gradient_checkpointing=True)


def half() -> Found:
    """float16, whose scaled loss overflows at first."""
    model, tokenizer = spd.load_model(FOLDER, dtype="float16")
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    before, gradients.INITIAL_FP16_SCALE = gradients.INITIAL_FP16_SCALE, 2.0**40
    try:
        return calibrated(model, tokenizer, examples(), rank=4)
    finally:
        gradients.INITIAL_FP16_SCALE = before


def sharded_poisoned() -> Found:
    model, tokenizer = sharded_model()
    given = examples()
    given[4] = spd.Example("Question ~", " answer", [(11, 17)])
    poison = tokenizer("~")["input_ids"][0]
    with torch.no_grad():
        local = model.get_input_embeddings().weight.to_local()
        rows = -(-model.config.vocab_size // dist.get_world_size())
        if poison // rows == dist.get_rank():
            local[poison % rows] = float("nan")
    return calibrated(model, tokenizer, given, batch_size=3)


def on_main() -> Found:
    """What the first process alone does, and where it fails."""

    def full() -> None:
        raise OSError("no space left")

    result = {"from": distributed.on_main(distributed.rank)}
    try:
        distributed.on_main(full)
    except OSError as error:
        result["error"] = str(error)
    return result


def wrapped() -> Found:
    model, tokenizer = spd.load_model(FOLDER)
    replicated = calibrated(DistributedDataParallel(model), tokenizer, examples())
    flattened = calibrated(FullyShardedDataParallel(model, device_id=torch.device("cpu")), tokenizer, examples())
    return {"error": [replicated["error"], flattened["error"]]}


JOBS: list[tuple[Callable[[], Found], tuple[int, ...]]] = [
    (plain, (1, 2, 3)),
    (one_batch, (1, 3)),
    (poisoned, (2,)),
    (no_examples_in_one, (2,)),
    (other_examples, (2,)),
    (other_settings, (2,)),
    (other_weights, (2,)),
    (a_bug_in_one, (2,)),
    (sharded, (2, 3)),
    (sharded_after_training, (2,)),
    (sharded_and_checkpointed, (2,)),
    (half, (1, 2)),
    (sharded_poisoned, (2,)),
    (on_main, (2,)),
    (wrapped, (2,)),
]


def run(size: int, number: int) -> None:
    """Every job of so many processes, in this one."""
    torch.set_num_threads(1)
    meet(FOLDER, size, number)
    for job, sizes in JOBS:
        if size in sizes:
            torch.save(job(), FOLDER / f"{job.__name__}-{size}-{number}.pt")
    distributed.leave()


if __name__ == "__main__":
    sys.exit(carry_out(run, (1, 2, 3), seconds=180))
