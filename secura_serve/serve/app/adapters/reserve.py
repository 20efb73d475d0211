"""Room in the shared basis for adapters that come while the server runs."""

from __future__ import annotations

from tqdm import tqdm

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import ConfigError
from secura_serve.method import Basis, select
from secura_serve.serve.logs import is_json

__all__ = ["DEFAULT_RANK", "reserved_basis"]

DEFAULT_RANK = 32
"""The rank that room is made for where no adapter says which."""


def reserved_basis(base: Checkpoint, r: int) -> dict[str, Basis]:
    """Return rows and columns of every linear, as training selects them by default up to rank r.

    Reads the whole base once. A linear that is too small or too sparse for r is left out.
    """
    chosen = {}
    for module in tqdm(
        base.linears(), desc=f"reserving rank {r}", unit="linear", leave=False, disable=is_json()
    ):
        try:
            chosen[module] = select(base.weight(module), r, module=module)
        except ConfigError:
            continue
    return chosen
