"""R·x where ranks share a linear's outputs, as the torch op ``secura_rows::product``.

Each rank keeps all chosen rows of W, so that no rank asks another for a part of y at every step.
torch.compile does not look into the op: a batch without adapters costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product"]


def product(x: Tensor, R: Tensor, active: Tensor, clear: bool) -> Tensor:
    """Return x·Rᵀ, or anything where the flag ``active`` is off.

    Args:
        x: ``(T, in)``.
        R: ``(n·r, in)``.
        active: ``()`` bool on the CPU.
        clear: whether "anything" has to be zeros.

    Returns:
        ``(T, n·r)``.
    """
    if active.item():
        return torch.mm(x, R.T)
    made = torch.zeros if clear else torch.empty
    return made(x.shape[0], R.shape[0], dtype=x.dtype, device=x.device)


_LIBRARY = torch.library.Library("secura_rows", "DEF")
_LIBRARY.define("product(Tensor x, Tensor R, Tensor active, bool clear) -> Tensor")
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("product", product, _key)
torch.library.register_fake(
    "secura_rows::product",
    lambda x, R, active, clear: x.new_empty(x.shape[0], R.shape[0]),
    lib=_LIBRARY,
)
