"""The shared basis: which rows and columns of every linear the engine keeps at hand.

It is the ordered union of the indices of all adapters. Adapters of one seed share theirs, so that
the union is simply the widest of them; one that is off the shared basis widens it, and every
token pays for the width. It is made once by the server and read by every worker, because the
order in which adapters load differs between tensor-parallel ranks.
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

from secura_serve.adapter import Adapter, CURModule
from secura_serve.errors import AdapterFormatError, UnservableError
from secura_serve.method import Basis

__all__ = ["Gains", "SharedBasis", "base_id"]

Gains = Mapping[str, float]
"""Module -> ‖C‖·‖R‖/√(out·in), see :mod:`secura_serve.adapter.limits`."""


def base_id(adapter: Adapter) -> str:
    """A digest of what the adapter says about its base and of the indices that it uses.

    Adapters of one base, rank, target set and seed have the same, so that one comparison with
    the checkpoint answers for all of them.
    """
    digest = hashlib.sha256()
    for name, cur in sorted(adapter.modules.items()):
        claim = adapter.config.base_fingerprint[name]
        digest.update(f"{name}|{claim}|{len(cur.rows)}\n".encode())
        digest.update(torch.cat([cur.rows, cur.cols]).to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:32]


def _union(lists: Iterable[Tensor]) -> Tensor:
    merged: dict[int, None] = {}
    for indices in lists:
        merged.update(dict.fromkeys(indices.tolist()))
    return torch.tensor(list(merged), dtype=torch.int64)


@dataclass(frozen=True)
class SharedBasis:
    """Rows and columns per module, and the bases that were verified against the checkpoint."""

    modules: Mapping[str, Basis]
    verified: Mapping[str, Gains]
    """:func:`base_id` of every adapter whose fingerprint the server has checked."""

    @classmethod
    def of(cls, adapters: Iterable[Adapter], gains: Mapping[str, Gains]) -> SharedBasis:
        """The ordered union over ``adapters``, the widest first; all of them are in ``gains``."""
        ranked = sorted(adapters, key=lambda a: (-a.config.r, a.name))
        names = dict.fromkeys(module for a in ranked for module in a.modules)
        modules = {}
        for name in names:
            users = [a.modules[name] for a in ranked if name in a.modules]
            modules[name] = Basis(_union(u.rows for u in users), _union(u.cols for u in users))
        return cls(modules, {key: gains[key] for key in dict.fromkeys(map(base_id, ranked))})

    @property
    def width(self) -> int:
        """The largest number of rows or columns over all modules."""
        return max((max(len(b.rows), len(b.cols)) for b in self.modules.values()), default=0)

    def outsiders(self, adapters: Iterable[Adapter]) -> list[str]:
        """Names of the adapters that do not use the first rows and columns, as those of one seed
        do: they widen the basis."""
        known: dict[int, bool] = {}

        def outside(modules: Mapping[str, CURModule]) -> bool:
            return any(
                not torch.equal(cur.rows, self.modules[name].rows[: len(cur.rows)])
                or not torch.equal(cur.cols, self.modules[name].cols[: len(cur.cols)])
                for name, cur in modules.items()
            )

        names = []
        for adapter in adapters:
            # A catalog shares the modules of adapters with one basis.
            key = id(adapter.modules)
            known[key] = known[key] if key in known else outside(adapter.modules)
            names += [adapter.name] if known[key] else []
        return names

    def embed(self, module: str, cur: CURModule) -> Tensor:
        """U placed at the adapter's positions in the basis, ``(k, m)`` float32: no larger than the
        highest position in use; U itself where the adapter is on the basis.

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
        """Write as JSON under a name made of its content; atomic, and equal content is reused."""
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
