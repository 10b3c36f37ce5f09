"""-log p of every labelled token, summed, with logits that are never all there at once where they would be many."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from spd.training.texts import IGNORED

LOGITS_AT_ONCE = 1 << 22  # 16 MiB in float32; above it a vocabulary of 150,000 would take most of a batch's memory
LOGITS_AT_ONCE_ON_GPU = 1 << 26  # 256 MiB: 447 rows of that vocabulary to fill it; by arithmetic, not measured


def logits_at_once(device: torch.device) -> int:
    return LOGITS_AT_ONCE_ON_GPU if device.type == "cuda" else LOGITS_AT_ONCE


class SummedLoss:
    """The loss of a model whose output layer is not trained.

    Few logits are taken from the model as it is. Of many only those that a label needs are computed, some rows at a
    time, each turned into its gradient before the next; so memory does not grow with tokens times vocabulary. That
    needs a model that does nothing to its logits after the output layer (soft caps and scales do), which is tried once.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self.vocabulary = model.config.get_text_config().vocab_size

    def __call__(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """Labels (B, T), of which IGNORED and each row's first do not count, and what the model takes."""
        targets = pad(labels, (0, 1), value=IGNORED)[:, 1:]
        at_once = logits_at_once(labels.device)
        if labels.numel() * self.vocabulary > at_once and self.in_parts:
            hidden, _ = self._hidden(inputs)
            kept = (targets != IGNORED).to(hidden.device)
            rows = max(1, at_once // self.vocabulary)
            total: Tensor = _LossInParts.apply(hidden[kept], targets.to(hidden.device)[kept], self.head, rows)
            return total
        logits = self.model(**inputs, use_cache=False).logits.float()
        flat = targets.reshape(-1).to(logits.device)
        return cross_entropy(logits.view(-1, logits.shape[-1]), flat, ignore_index=IGNORED, reduction="sum")

    def _hidden(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What goes into the output layer (B, T, width), and the logits of the first row's last token alone."""
        taken: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            taken.append(args[0])
            return (args[0][:1, -1:], *args[1:])

        handle = self.head.register_forward_pre_hook(take)
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        return taken[0], logits

    @cached_property
    @torch.no_grad()
    def in_parts(self) -> bool:
        """Whether a token's logits are what the output layer makes of its hidden state, and nothing more."""
        if not isinstance(self.head, nn.Module):
            return False
        device = self.model.get_input_embeddings().weight.device
        tokens = torch.arange(2, device=device)[None]
        training = self.model.training
        self.model.eval()
        try:
            hidden, logits = self._hidden({"input_ids": tokens})
            if hidden.shape[:2] != tokens.shape or logits.shape[:2] != (1, 1):
                return False
            return torch.equal(_logits(self.head, hidden[:, -1:]), logits.float())
        except (IndexError, TypeError):  # the output layer is called in another way, or not at all
            return False
        finally:
            self.model.train(training)


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """In float32. Under autocast some layers leave float32 to a head in half precision, called outside of it here."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        hidden = hidden.to(weight.dtype)
    logits: Tensor = head(hidden).float()
    return logits


class _LossInParts(torch.autograd.Function):
    """Sum of cross-entropies; the gradient at the hidden states is made on the way forward, part by part."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                some = hidden[part].detach().requires_grad_()
                loss = cross_entropy(_logits(head, some), targets[part], reduction="sum")
            (gradient[part],) = torch.autograd.grad(loss, some)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(gradient.dtype), None, None, None
