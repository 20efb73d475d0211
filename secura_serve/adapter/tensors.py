"""The tensors of ``adapter_model.safetensors``: three or four a module.

Names follow PEFT: ``base_model.model.<module>.secura_U`` and so on. C and R are never stored: they
are rows and columns of the base, named by ``rows`` and ``cols``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from secura_serve.adapter.format import AdapterConfig
from secura_serve.method import Basis

__all__ = ["FLOATS", "CURModule", "module_problems", "parse_modules"]

_KEY = re.compile(
    r"(?P<prefix>base_model\.model\.)?(?P<module>.+)\.secura_(?P<field>U|rows|cols|rho_max)"
)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What U may be stored as; of narrower floats torch cannot even tell whether they are finite."""


@dataclass(frozen=True)
class CURModule:
    """One adapted linear: Δ = W[:, cols] · U · W[rows, :], before S-MagNorm."""

    U: Tensor
    """``(r, r)`` float: the effective core, A·B and alpha multiplied in."""
    rows: Tensor
    """``(r,)`` int32, indices into the ``out`` axis."""
    cols: Tensor
    """``(r,)`` int32, indices into the ``in`` axis."""
    rho_max: float | None = None
    """Of the modes that need it, such as ``published``: max of |Δ|/(|W|+ε) over the module."""

    @property
    def basis(self) -> Basis:
        """The indices as int64."""
        return Basis(self.rows.to(torch.int64), self.cols.to(torch.int64))

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return the entries of ``adapter_model.safetensors`` for ``module``."""
        prefix = f"base_model.model.{module}.secura_"
        named = {"U": self.U, "rows": self.rows, "cols": self.cols}
        if self.rho_max is not None:
            named["rho_max"] = torch.tensor(self.rho_max, dtype=torch.float32)
        return {prefix + name: tensor.contiguous() for name, tensor in named.items()}


def module_problems(module: str, cur: CURModule, config: AdapterConfig) -> list[str]:
    """Return everything wrong with one module that can be seen without the base."""
    r, problems = config.r, []
    if cur.U.shape != (r, r) or cur.U.dtype not in FLOATS:
        problems.append(
            f"{module}: secura_U is {cur.U.dtype} {tuple(cur.U.shape)}; expected float ({r}, {r})"
        )
    elif not torch.isfinite(cur.U).all():
        problems.append(f"{module}: secura_U holds NaN or Inf")
    for name, index in (("rows", cur.rows), ("cols", cur.cols)):
        if index.dtype != torch.int32 or index.shape != (r,):
            problems.append(
                f"{module}: secura_{name} is {index.dtype} {tuple(index.shape)}; "
                f"expected int32 ({r},)"
            )
        elif int(index.min()) < 0 or len(set(index.tolist())) != r:
            problems.append(f"{module}: secura_{name} must be distinct and not negative")
    if config.magnorm.needs_rho_max and cur.rho_max is None:
        problems.append(f"{module}: magnorm {config.magnorm.mode!r} needs secura_rho_max")
    if cur.rho_max is not None and not (math.isfinite(cur.rho_max) and cur.rho_max >= 0):
        problems.append(f"{module}: secura_rho_max is {cur.rho_max}; expected a number >= 0")
    if module not in config.base_fingerprint:
        problems.append(f"{module}: no entry in base_fingerprint")
    return problems


def parse_modules(
    tensors: Iterable[tuple[str, Tensor]], config: AdapterConfig, *, prefixed: bool = True
) -> tuple[dict[str, CURModule], list[str]]:
    """Sort the tensors of an adapter by module and check them.

    Args:
        tensors: name and tensor of everything in the file.
        prefixed: whether every name must begin with ``base_model.model.``; PEFT takes that off.

    Returns:
        The modules that are complete, and every problem: an unknown or missing tensor, a wrong
        shape, dtype or value, a module without a fingerprint or the other way round.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, CURModule] = {}
    problems = []
    for key, tensor in tensors:
        match = _KEY.fullmatch(key)
        if match is None or (prefixed and match["prefix"] is None):
            problems.append(f"tensor {key!r} is not part of the format")
        else:
            fields.setdefault(match["module"], {})[match["field"]] = tensor.cpu()
    for module, named in fields.items():
        missing = sorted({"U", "rows", "cols"} - set(named))
        if missing:
            problems.append(f"{module}: secura_{', secura_'.join(missing)} missing")
            continue
        rho_max = named.get("rho_max")
        if rho_max is not None and (rho_max.numel() != 1 or rho_max.dtype not in FLOATS):
            problems.append(f"{module}: secura_rho_max must be one float")
            continue
        modules[module] = CURModule(
            named["U"], named["rows"], named["cols"], None if rho_max is None else float(rho_max)
        )
        problems += module_problems(module, modules[module], config)
    absent = sorted(set(config.base_fingerprint) - set(fields))
    problems += [f"{module}: in base_fingerprint but without tensors" for module in absent]
    return modules, problems
