"""What talks to a running ``secura-serve`` from elsewhere: so far, sending it an adapter.

The names load on first use: importing the package imports neither torch nor httpx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy

if TYPE_CHECKING:
    from secura_serve.client.pushing import Pushed, check_target, push

__all__ = ["Pushed", "check_target", "push"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, dict.fromkeys(__all__, "pushing"))
