"""``AdapterState``: the indices, cores and scales of the CUR adapters on one layer."""

from __future__ import annotations

from operator import is_

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secura_serve.adapter import CURModule, fingerprint
from secura_serve.errors import ConfigError
from secura_serve.method import (
    CALIBRATED,
    Basis,
    Coordinates,
    MagNorm,
    auto_alpha,
    init_A,
    select,
)
from secura_serve.train.tuner.config import SecuraConfig

__all__ = ["AdapterState"]


class AdapterState(BaseTunerLayer):
    """The adapters of one layer, by name: how they are created, loaded and fused.

    ``secura_U`` (r, r), or ``secura_A`` (r, m) and ``secura_B`` (m, r), are trained, in float32.
    ``secura_rows``, ``secura_cols``, ``secura_running`` (r, r), the sum that :meth:`fuse` makes,
    and ``secura_left`` and ``secura_right`` (r, r), the coordinates if there are any, are buffers
    outside the state dict. C and R are gathered from W ``(out, in)`` when needed.
    """

    adapter_layer_names = ("secura_U", "secura_A", "secura_B")
    other_param_names = (
        *("secura_rows", "secura_cols", "secura_running", "secura_left", "secura_right"),
        *("secura_alpha", "secura_norm", "secura_dropout"),
    )

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        self.base_layer = base_layer
        self.module = module
        self.secura_U = nn.ParameterDict()
        self.secura_A = nn.ParameterDict()
        self.secura_B = nn.ParameterDict()
        self.secura_rows = BufferDict(persistent=False)
        self.secura_cols = BufferDict(persistent=False)
        self.secura_running = BufferDict(persistent=False)
        self.secura_left = BufferDict(persistent=False)
        self.secura_right = BufferDict(persistent=False)
        self.secura_alpha: dict[str, float] = {}
        self.secura_norm: dict[str, MagNorm] = {}
        self.secura_dropout: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self._fingerprints: dict[str, tuple[tuple[int, ...], Basis, str]] = {}
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = self.pristine.shape

    @property
    def pristine(self) -> Tensor:
        """The base weight W ``(out, in)`` before any merge."""
        W = self.get_base_layer().weight.data if self._unmerged is None else self._unmerged
        return W.T if self.transposed else W

    def create(self, name: str, config: SecuraConfig) -> None:
        """Add adapter ``name``: choose its basis from W and create its core, Δ = 0.

        Raises:
            ConfigError: the rank does not fit W, or the basis does not rank this layer.
            BaseMismatchError: the basis was made from another base.
        """
        W, basis = self.pristine, self._choose(config)
        alpha = self._scale(config, basis) if basis.r else 1.0
        self._set_basis(name, basis, alpha, config.norm)
        self.secura_dropout[name] = config.dropout
        if config.core == "u":
            U = torch.zeros(config.r, config.r, dtype=torch.float32, device=W.device)
            self.secura_U[name] = nn.Parameter(U)
        else:
            self._start_factors(name, config)

    def _choose(self, config: SecuraConfig) -> Basis:
        """Return the rows and columns of a new adapter.

        There are none if its selection names a basis file that is not given: such settings are
        those of a folder, whose own indices :meth:`load_core` takes.
        """
        W, (rule, seed) = self.pristine, config.rule_and_seed
        ranking = config.basis.ranking(self.module, W) if config.basis else None
        if rule == CALIBRATED and ranking is None:
            return Basis(none := torch.empty(0, dtype=torch.int64), none)
        return select(W, config.r, module=self.module, rule=rule, seed=seed, ranking=ranking)

    def _scale(self, config: SecuraConfig, basis: Basis) -> float:
        auto = config.alpha == "auto"
        return auto_alpha(self.pristine, basis) if auto else float(config.alpha)

    def _start_factors(self, name: str, config: SecuraConfig) -> None:
        A = init_A(self.pristine, config.r, m := config.inner_rank or config.r, config.init)
        self.secura_A[name] = nn.Parameter(A)
        self.secura_B[name] = nn.Parameter(torch.zeros(m, config.r, dtype=A.dtype, device=A.device))

    def _set_basis(self, name: str, basis: Basis, alpha: float, norm: MagNorm) -> None:
        device = self.pristine.device
        self.secura_rows[name] = basis.rows.to(device, torch.int64)
        self.secura_cols[name] = basis.cols.to(device, torch.int64)
        self.secura_alpha[name] = alpha
        self.secura_norm[name] = norm

    def load_core(self, name: str, cur: CURModule, config: SecuraConfig) -> None:
        """Set the effective core and the indices of adapter ``name``, as a file holds them.

        A frozen adapter takes them exactly, with s = 1. An adapter that is to be trained keeps s,
        so that the learning rate has the same effect (U = core / s, rounded once); coordinates are
        those of U itself until :meth:`set_coordinates` is called again. With core
        ``ab``, whose factors are not in the file, core / s becomes the running core, and B starts
        at 0.
        """
        parameters = (self.secura_U, self.secura_A, self.secura_B)
        trained = any(values[name].requires_grad for values in parameters if name in values)
        for parts in (*parameters, self.secura_running, self.secura_left, self.secura_right):
            if name in parts:
                del parts[name]
        alpha = self._scale(config, cur.basis) if trained else 1.0
        self._set_basis(name, cur.basis, alpha, config.norm)
        self.secura_dropout[name] = config.dropout
        U = cur.U.to(self.pristine.device, torch.float32, copy=True).div_(alpha)
        if trained and config.core == "ab":
            self.secura_running[name] = U
            self._start_factors(name, config)
        else:
            self.secura_U[name] = nn.Parameter(U, requires_grad=trained)

    def core(self, name: str) -> Tensor:
        """Return the core ``s·L·U·P``, ``(r, r)``; differentiable.

        L and P are the coordinates, if there are any; of core ``ab``, U is ``running + A·B``.
        """
        if name in self.secura_U:
            U: Tensor = self.secura_U[name]
        else:
            U = self.secura_A[name] @ self.secura_B[name]
            if name in self.secura_running:
                U = U + self.secura_running[name]
        if name in self.secura_left:
            U = self.secura_left[name] @ U @ self.secura_right[name]
        return self.secura_alpha[name] * U

    def set_coordinates(self, name: str, coordinates: Coordinates) -> None:
        """Train a new adapter ``name`` in other coordinates of U; Δ stays 0.

        Raises:
            ConfigError: the adapter is not new: its Δ would change.
        """
        with torch.no_grad():
            if self.core(name).any():
                raise ConfigError(
                    f"{self.module}: adapter {name!r} has been trained; coordinates are set before"
                )
        device = self.pristine.device
        self.secura_left[name] = coordinates.left.to(device, torch.float32)
        self.secura_right[name] = coordinates.right.to(device, torch.float32)

    def basis(self, name: str) -> Basis:
        """Return the rows and columns of adapter ``name``.

        Raises:
            ConfigError: there are none yet, see :meth:`_choose`.
        """
        basis = Basis(self.secura_rows[name], self.secura_cols[name])
        if not basis.r:
            raise ConfigError(
                f"{self.module}: adapter {name!r} has no rows and columns. Those of a trained "
                "adapter come with its folder: PeftModel.from_pretrained(model, folder). A new "
                "one needs the basis: SecuraConfig(basis=load_basis(FILE))"
            )
        return basis

    def fingerprint(self, name: str) -> str:
        """Return the fingerprint of the pristine W under adapter ``name``.

        It is kept until W or the indices change, because a run that updates a server asks for it
        at every update, and gathering and hashing take longer than sending.
        """
        W, basis = self.pristine, self.basis(name)
        # The address tells W from another tensor, the version from what it held before.
        weight = (W.data_ptr(), self.get_base_layer().weight._version)
        known = self._fingerprints.get(name)
        if known and known[0] == weight and all(map(is_, known[1], basis)):
            return known[2]
        digest = fingerprint(W, basis)
        self._fingerprints[name] = (weight, basis, digest)
        return digest

    @torch.no_grad()
    def fuse(self, name: str) -> None:
        """Add A·B to the running core and set B to 0; Δ does not change.

        This is both M1 and M2 of SECURA: with C and R from the pristine W, both give
        ``Σ_t A_t·B_t``. A and the optimiser's moments stay. If this is called after every step (the
        paper's fusion step 1), B is 0 in every forward pass, so A gets no gradient and never
        trains.

        Raises:
            ConfigError: the adapter has no A and B.
        """
        if name not in self.secura_A:
            raise ConfigError(f"{self.module}: adapter {name!r} has core 'u'; fusion needs 'ab'")
        total = self.secura_A[name] @ self.secura_B[name]
        if name in self.secura_running:
            total += self.secura_running[name]
        self.secura_running[name] = total
        self.secura_B[name].zero_()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter, and nothing more: PEFT would also round the core to the base's dtype."""
        device = device or self.pristine.device
        for values in (self.secura_U, self.secura_A, self.secura_B):
            if adapter_name in values:
                values[adapter_name].data = values[adapter_name].data.to(device)
        buffers = (self.secura_rows, self.secura_cols, self.secura_running)
        for values in (*buffers, self.secura_left, self.secura_right):
            if adapter_name in values:
                values[adapter_name] = values[adapter_name].to(device)
