"""How much each output and input of every linear layer carries on the base's own text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from secura_serve.train.data.base_text import BaseText

__all__ = ["Energies", "linears", "measure", "read_text", "weight_of"]


@dataclass
class Energies:
    """Sums over all tokens for one W ``(out, in)``, float64."""

    rows: Tensor
    """Σ (Wx)_i², ``(out,)``, before the bias."""
    cols: Tensor
    """Σ (Wᵀg)_j², ``(in,)``; 0 unless gradients were asked for."""


def linears(model: Any) -> dict[str, nn.Module]:
    """Return the layers that PEFT's ``all-linear`` adapts: all linear ones but the output's."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    }


def weight_of(layer: nn.Module) -> Tensor:
    """Return W ``(out, in)`` of a linear layer, a view of its parameter."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def measure(
    model: Any, text: BaseText, *, gradients: bool = False, batch_size: int = 8
) -> dict[str, Energies]:
    """Run the base over its own text and add up what each linear layer puts out.

    Every position counts, also those of the chat template, which every request has. With
    ``gradients`` the loss is the cross-entropy, in nats, of the tokens that the base wrote. These
    are drawn from its own distribution, so that E[g gᵀ] is the Fisher information of y.

    Args:
        model: the causal language model without adapters, in evaluation mode.

    Returns:
        Module name -> sums. Needs one forward pass, with ``gradients`` also a backward one.
    """
    layers = linears(model)
    sums = {
        name: Energies(*(torch.zeros(n, dtype=torch.float64) for n in weight_of(layer).shape))
        for name, layer in layers.items()
    }
    with _watched(layers, sums, gradients):
        read_text(model, text, gradients=gradients, batch_size=batch_size)
    return sums


def read_text(model: Any, text: BaseText, *, gradients: bool, batch_size: int = 8) -> None:
    """Run the base over its own text, for hooks on its layers to see it.

    With ``gradients`` also backwards, from the cross-entropy in nats, summed over the tokens that
    the base wrote. No parameter gets a gradient.
    """
    starts = range(0, len(text.tokens), batch_size)
    with _frozen(model), torch.set_grad_enabled(gradients):
        for start in tqdm(starts, "the base reads it", unit="batch"):
            tokens = text.tokens[start : start + batch_size].to(model.device)
            if not gradients:
                model(input_ids=tokens, use_cache=False, logits_to_keep=1)
                continue
            # All parameters are frozen, so the gradient flows because the input wants one.
            vectors = model.get_input_embeddings()(tokens).detach().requires_grad_()
            logits = model(inputs_embeds=vectors, use_cache=False).logits[:, text.start - 1 : -1]
            wide = torch.promote_types(logits.dtype, torch.float32)
            written = tokens[:, text.start :]
            F.cross_entropy(
                logits.flatten(0, 1).to(wide), written.flatten(), reduction="sum"
            ).backward()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Take no gradient of any parameter inside the block."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _watched(
    layers: dict[str, nn.Module], sums: dict[str, Energies], gradients: bool
) -> Iterator[None]:
    """Add up the outputs of ``layers``, and their gradients, inside the block."""
    handles = [
        layer.register_forward_hook(_watcher(layer, sums[name], gradients))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(layer: nn.Module, sums: Energies, gradients: bool) -> Callable[..., None]:
    def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y = output.detach()
        if getattr(layer, "bias", None) is not None:
            # Not y − b: a large bias would leave nothing but its rounding.
            W = weight_of(layer)
            wide = torch.promote_types(W.dtype, torch.float32)
            y = F.linear(inputs[0].detach().to(wide), W.to(wide))
        sums.rows += _squares(y)
        if gradients:
            output.register_hook(after_backward)

    def after_backward(g: Tensor) -> None:
        W = weight_of(layer)
        wide = torch.promote_types(W.dtype, torch.float32)
        sums.cols += _squares(g.to(wide) @ W.to(wide))

    return after_forward


def _squares(values: Tensor) -> Tensor:
    """Return the sum of squares over all but the last dimension, float64, on the CPU."""
    return values.flatten(0, -2).to(torch.float64).square().sum(0).cpu()
