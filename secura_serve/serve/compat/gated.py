"""Gated MLPs of vLLM whose forward is down(act(gate_up(x))), and ours in its place.

What a forward does is not looked up in a list of classes but found out, on stand-ins for its
linears: a class that does anything else, in any version, keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from secura_serve.serve.compat.names import require

__all__ = ["gated_activation", "take_activation"]

_PARTS = ("gate_up_proj", "act_fn", "down_proj")


def gated_activation(mlp: Any) -> str | None:
    """Return the activation of a gated MLP by our name; None where it is not one that we know.

    Raises:
        IncompatibleVLLMError: a layer of vLLM's that we know has lost an attribute.
    """
    if not all(hasattr(mlp, part) for part in _PARTS) or not _is_plain(mlp):
        return None
    kind = type(mlp.act_fn).__name__
    if kind == "SiluAndMul":
        return "silu"
    if kind == "GeluAndMul":
        require(kind, mlp.act_fn, ("approximate",))
        return "gelu_tanh" if mlp.act_fn.approximate == "tanh" else None
    return None


def take_activation(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """Have the forward of an MLP ask its ``gate_up_proj`` for ``activated``; return its own act.

    Its class becomes a subclass, so that whoever asks for its type, torch.compile too, is right.
    """
    cls: Any = type(mlp)
    mlp.__class__ = _ours(cls)
    act: Callable[[Tensor], Tensor] = mlp.act_fn  # type: ignore[assignment]
    return act


@cache
def _ours(cls: Any) -> Any:
    return type(f"CUR{cls.__name__}", (cls,), {"forward": _forward})


def _forward(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(self.gate_up_proj.activated(x))[0]
    return out


def _is_plain(mlp: Any) -> bool:
    """Return whether forward hands x to gate_up_proj, that to act_fn, that to down_proj alone."""
    if "forward" in vars(mlp):
        return False
    x, y, z, out, calls = object(), object(), object(), object(), list[str]()

    def stand_in(name: str, wanted: object, made: object) -> Callable[[object], object]:
        def call(given: object) -> object:
            if given is not wanted:
                raise ValueError(name)
            calls.append(name)
            return made

        return call

    steps = zip(_PARTS, (x, y, z), ((y, None), z, (out, None)), strict=True)
    parts = {name: stand_in(name, wanted, made) for name, wanted, made in steps}
    try:
        answer = type(mlp).forward(SimpleNamespace(**parts), x)
    except Exception:
        # Of whatever kind: it does something else with its parts, or with x.
        return False
    return answer is out and calls == list(_PARTS)
