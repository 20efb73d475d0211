"""The native fold of a weight: C code, compiled at first use, and its Python side."""

from __future__ import annotations

from secura_serve.method.native.binding import FORMS, Update, is_supported, product, write

__all__ = ["FORMS", "Update", "is_supported", "product", "write"]
