"""What the base says about each token of the retention text, kept compactly, and the KL to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from secura_serve.train.data import IGNORE, Collator, Rows
from secura_serve.train.loop.loss import answer_logits
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.output.checkpoints import is_main_process

__all__ = ["TOP", "Targets", "base_only", "base_targets", "bucketed_kl", "compact"]

TOP = 64
"""How many of the base's most likely tokens are kept one by one."""


@dataclass(frozen=True)
class Targets:
    """The base's distribution p at P positions: its k most likely tokens, and all others as one."""

    ids: Tensor
    """``(P, k)`` int32, the most likely tokens."""
    log_p: Tensor
    """``(P, k)``, log p of those tokens."""
    log_rest: Tensor
    """``(P,)``, log of the probability of all others together; −inf if there are none."""

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return sum(t.numel() * t.element_size() for t in (self.ids, self.log_p, self.log_rest))

    def at(self, parts: Sequence[slice], device: torch.device) -> Targets:
        """Return those at ``parts``, one after another, on ``device``."""
        kept = (self.ids, self.log_p, self.log_rest)
        return Targets(*(torch.cat([t[part] for part in parts]).to(device) for t in kept))


def compact(logits: Tensor, k: int = TOP) -> Targets:
    """Return the targets of logits ``(P, V)``; with V <= k every token is kept one by one.

    Numbers have the dtype of ``logits``.
    """
    k = min(k, logits.shape[-1])
    total = logits.logsumexp(-1)
    values, ids = logits.topk(k, dim=-1)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total
    return Targets(ids.int(), values - total[:, None], rest)


def bucketed_kl(logits: Tensor, targets: Targets) -> Tensor:
    """Return KL(p ‖ q) at each position, with all but the base's k tokens as one bucket.

    ``Σ_k p_k·(log p_k − log q_k) + p_rest·(log p_rest − log q_rest)``. It is never above the KL
    over all tokens, because putting tokens together cannot raise a KL (data processing
    inequality), and it does not see how q spreads its probability within the bucket.

    Args:
        logits: ``(P, V)`` of the adapted model; q is their softmax.
        targets: of the base at the same positions.

    Returns:
        ``(P,)`` in nats, in the dtype of ``logits``.
    """
    ids = targets.ids.long()
    total = logits.logsumexp(-1)
    log_q = logits.gather(-1, ids) - total[:, None]
    kl = (targets.log_p.exp() * (targets.log_p - log_q)).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return kl
    # Of the other logits, and not 1 − Σ q_k: that would lose all digits where the bucket is small.
    log_q_rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total
    # A finite stand-in for log 0, whose product with p_rest = 0 is 0 and not NaN.
    log_p_rest = targets.log_rest.clamp_min(-1e4)
    return kl + targets.log_rest.exp() * (log_p_rest - log_q_rest)


@contextmanager
def base_only(prepared: PreparedModel) -> Iterator[None]:
    """Make the model answer as its base, as it will compute in training but without dropout.

    Of a model all of whose weights are trained, this is the base only before the training.
    """
    model, config = prepared.model, prepared.config
    mixed = prepared.method.trains_all_weights and config.dtype == "bfloat16"
    disabled = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    training = model.training
    model.eval()
    try:
        with (
            disabled,
            torch.no_grad(),
            torch.autocast(model.device.type, torch.bfloat16, enabled=mixed),
        ):
            yield
    finally:
        model.train(training)


def base_targets(prepared: PreparedModel, rows: Rows, batch_size: int = 8) -> Targets:
    """Compute the targets of every label of ``rows``, row after row, in float32 on the CPU."""
    collate, device = Collator(prepared.tokenizer.pad_token_id), prepared.model.device
    parts = []
    starts = range(0, len(rows), batch_size)
    quiet = not is_main_process()
    with base_only(prepared):
        for start in tqdm(starts, "retention targets", unit="batch", delay=2, disable=quiet):
            batch = collate(rows[start : start + batch_size])
            logits, labels = answer_logits(
                prepared.model, {k: v.to(device) for k, v in batch.items()}
            )
            targets = compact(logits[labels != IGNORE])
            parts.append([t.cpu() for t in (targets.ids, targets.log_p, targets.log_rest)])
    return Targets(*(torch.cat(part) for part in zip(*parts, strict=True)))
