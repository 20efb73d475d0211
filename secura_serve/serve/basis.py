"""The shared basis: the rows and columns of every linear that the served adapters use.

The basis of a linear is the ordered union of all adapters' indices. Adapters that were trained with
one seed use the same indices, so their union is that of the adapter with the highest rank. An
adapter with other indices makes the basis wider, which costs every token time. The server makes the
basis once and writes it to a file that every worker reads, because the order in which adapters load
differs between tensor-parallel ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secura_serve.adapter import Adapter, CURModule, base_id
from secura_serve.errors import AdapterFormatError, UnservableError
from secura_serve.method import Basis

__all__ = ["NormBounds", "SharedBasis", "base_id", "refuse_full_rank"]

NormBounds = Mapping[str, float]
"""Module -> ‖C‖·‖R‖/√(out·in), :func:`~secura_serve.adapter.limits.update_norm_bound`."""


def refuse_full_rank(adapter: Adapter) -> None:
    """Raise UnservableError for an adapter that is not C·U·R once its norm is applied."""
    mode = adapter.config.magnorm.mode
    if not adapter.config.magnorm.additive:
        raise UnservableError(
            f"{adapter.name}: S-MagNorm {mode!r} makes the update full-rank, so it cannot be "
            "chosen per request beside others. Start with --fold, or POST to /admin/fold"
        )


def _union(lists: Iterable[Tensor]) -> Tensor:
    merged: dict[int, None] = {}
    for indices in lists:
        merged.update(dict.fromkeys(indices.tolist()))
    return torch.tensor(list(merged), dtype=torch.int64)


@dataclass(frozen=True)
class SharedBasis:
    """Rows and columns per module, and the bases that were verified against the checkpoint."""

    modules: Mapping[str, Basis]
    verified: Mapping[str, NormBounds]
    """:func:`base_id` of every adapter whose fingerprint the server has checked."""

    @classmethod
    def of(cls, adapters: Iterable[Adapter], norm_bounds: Mapping[str, NormBounds]) -> SharedBasis:
        """Return the ordered union over ``adapters``, highest rank first.

        Args:
            norm_bounds: for the :func:`base_id` of every adapter, what the comparison with the
                checkpoint gave.
        """
        ranked = sorted(adapters, key=lambda a: (-a.config.r, a.name))
        names = dict.fromkeys(module for a in ranked for module in a.modules)
        modules = {}
        for name in names:
            users = [a.modules[name] for a in ranked if name in a.modules]
            modules[name] = Basis(_union(u.rows for u in users), _union(u.cols for u in users))
        return cls(modules, {key: norm_bounds[key] for key in dict.fromkeys(map(base_id, ranked))})

    def with_more(self, modules: Mapping[str, Basis]) -> SharedBasis:
        """Return the basis with more rows and columns behind its own."""
        wider = dict(self.modules)
        for name, more in modules.items():
            if (own := wider.get(name)) is not None:
                more = Basis(_union([own.rows, more.rows]), _union([own.cols, more.cols]))
            wider[name] = more
        return SharedBasis(wider, self.verified)

    @property
    def width(self) -> int:
        """The largest number of rows or columns over all modules."""
        return max((max(len(b.rows), len(b.cols)) for b in self.modules.values()), default=0)

    def off_basis(self, adapters: Iterable[Adapter]) -> list[str]:
        """Return the names of the adapters that widen the basis.

        An adapter is on the basis if it uses the basis's first rows and columns in every module,
        as all adapters of one seed do.
        """
        known: dict[int, bool] = {}

        def is_off(modules: Mapping[str, CURModule]) -> bool:
            return any(
                not torch.equal(cur.rows, self.modules[name].rows[: len(cur.rows)])
                or not torch.equal(cur.cols, self.modules[name].cols[: len(cur.cols)])
                for name, cur in modules.items()
            )

        names = []
        for adapter in adapters:
            # A catalog shares the modules of adapters with one basis.
            key = id(adapter.modules)
            known[key] = known[key] if key in known else is_off(adapter.modules)
            names += [adapter.name] if known[key] else []
        return names

    def to_shared_basis(self, module: str, cur: CURModule) -> Tensor:
        """Return U with its entries moved to the adapter's positions in the basis.

        Returns:
            ``(k, m)`` float32, where k and m are the highest positions in use plus one. This is U
            itself where the adapter is on the basis.

        Raises:
            UnservableError: the adapter uses a row or column that the basis lacks.
        """
        basis = self.modules.get(module)
        try:
            if basis is None:
                raise ValueError(module)
            r = len(cur.rows)
            if torch.equal(cur.rows, basis.rows[:r]) and torch.equal(cur.cols, basis.cols[:r]):
                return cur.U.to(torch.float32)
            places = []
            for wanted, have in ((cur.cols, basis.cols), (cur.rows, basis.rows)):
                position = {index: place for place, index in enumerate(have.tolist())}
                places.append(torch.tensor([position[i] for i in wanted.tolist()]))
        except (KeyError, ValueError) as error:
            raise UnservableError(
                f"{module}: the adapter uses a row or column that the running server does not "
                "keep. Restart the server with this adapter in its folder, or train it with the "
                "selection of the adapters that are served"
            ) from error
        U = torch.zeros(int(places[0].max()) + 1, int(places[1].max()) + 1, dtype=torch.float32)
        U[places[0][:, None], places[1][None, :]] = cur.U.to(torch.float32)
        return U

    def save(self, folder: Path) -> Path:
        """Write the basis as JSON into ``folder``, atomically, and return the file's path.

        The file's name is a digest of its content, so saving the same basis twice gives one file.
        """
        text = json.dumps(
            {
                "modules": {
                    name: {"rows": b.rows.tolist(), "cols": b.cols.tolist()}
                    for name, b in self.modules.items()
                },
                "verified": {key: dict(self.verified[key]) for key in sorted(self.verified)},
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"basis-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        handle, draft = tempfile.mkstemp(dir=folder, prefix=".basis-")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(draft, target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharedBasis:
        """Read what :meth:`save` wrote. Raises AdapterFormatError if it cannot be read."""
        try:
            raw = json.loads(Path(path).read_text())
            modules = {
                name: Basis(torch.tensor(b["rows"]), torch.tensor(b["cols"]))
                for name, b in raw["modules"].items()
            }
            return cls(modules, dict(raw["verified"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterFormatError(f"the shared basis {path} cannot be read: {error}") from error
