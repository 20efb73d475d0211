"""Making a calibrated basis, and finding the one that was made before."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from secura_serve import __version__
from secura_serve.adapter import CalibratedBasis, load_basis, weight_fingerprint
from secura_serve.bases import cache_root
from secura_serve.errors import BaseMismatchError, BasisFormatError, ConfigError
from secura_serve.method import Ranking, importance, order_indices, rank_by_energy
from secura_serve.system.atomic import only_writer
from secura_serve.train.basis.config import BasisConfig
from secura_serve.train.basis.energies import Energies, linears, measure, weight_of
from secura_serve.train.data.base_text import sample_base_text
from secura_serve.train.output.checkpoints import is_main_process

if TYPE_CHECKING:
    from torch import Tensor

    from secura_serve.train.settings import TrainConfig

__all__ = ["basis_of_run", "make_basis"]

SHIPPED = Path(__file__).parent


def make_basis(model: Any, tokenizer: Any, model_id: str, config: BasisConfig) -> CalibratedBasis:
    """Let the base write text, measure its layers on it and rank their rows and columns.

    The same settings, base, versions and number of threads give the same basis on one machine.

    Args:
        model: the causal language model without adapters.

    Raises:
        ConfigError: a measured energy is not finite.
    """
    text = sample_base_text(
        model, tokenizer, sequences=config.sequences, length=config.length, seed=config.seed
    )
    energies = measure(model, text, gradients=config.columns == "gradient")
    layers = linears(model)
    rankings = {
        name: _ranked(name, weight_of(layer), energies[name], text.tokens.numel(), config)
        for name, layer in layers.items()
    }
    facts = {
        "base": model_id,
        "seed": config.seed,
        "settings": config.of_the_ranking(),
        "tokens": text.tokens.numel(),
        "command": config.command(model_id),
        "threads": torch.get_num_threads(),
        "device": str(model.device.type),
        "versions": {
            "secura-serve": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }
    prints = {
        name: weight_fingerprint(weight_of(layer), rankings[name]) for name, layer in layers.items()
    }
    return CalibratedBasis(rankings, prints, facts)


def _ranked(
    module: str, W: Tensor, energies: Energies, tokens: int, config: BasisConfig
) -> Ranking:
    # Rounded as `importance` is: the last bits depend on the order of summation.
    row_energy, col_energy = (
        (part / tokens).to(torch.float32).numpy() for part in (energies.rows, energies.cols)
    )
    norms = importance(W, "row") if config.rows == "relative" else None
    try:
        rows, usable_rows = rank_by_energy(row_energy, norms)
        if config.columns == "gradient":
            cols, usable_cols = rank_by_energy(col_energy)
        else:
            p = importance(W, "col")
            cols = order_indices(p, config.columns, f"{config.seed}|{module}|col")
            usable_cols = int((p > 0).sum())
    except ConfigError as error:
        raise ConfigError(f"{module}: {error}") from error
    return Ranking(rows, cols, usable_rows, usable_cols)


def basis_of_run(config: TrainConfig, model: Any, tokenizer: Any, model_id: str) -> CalibratedBasis:
    """Return the basis of a run with ``--selection calibrated`` and without ``--basis``.

    It is the shipped one of the base, else the one that an earlier run put in the cache, else a
    new one, which is put there.
    """
    settings = BasisConfig(base=config.base, out="", seed=config.selection_seed, dtype=config.dtype)
    # Whatever the dtype of this run: a shipped basis is there to be shared.
    shipped = SHIPPED / f"{model_id}.safetensors"
    if config.selection_seed == 0 and (basis := _usable(shipped, model)):
        _tell(f"calibrated basis: {shipped}")
        return basis
    key = json.dumps([model_id, settings.of_the_ranking(), __version__], sort_keys=True)
    name = f"{Path(model_id).name}-{blake3(key.encode()).hexdigest()[:16]}.safetensors"
    file = cache_root() / "rankings" / name
    with only_writer(file, wait=True):
        if (basis := _usable(file, model)) is None:
            _tell(f"no calibrated basis of {config.base} yet; it is made once and kept in {file}")
            basis = make_basis(model, tokenizer, model_id, settings)
            basis.save(file)
        else:
            _tell(f"calibrated basis: {file}")
    return basis


def _usable(file: Path, model: Any) -> CalibratedBasis | None:
    """Return the basis in ``file`` if it is whole and of this base."""
    if not file.is_file():
        return None
    try:
        basis = load_basis(file)
        for module, layer in linears(model).items():
            basis.ranking(module, weight_of(layer))
    except (BasisFormatError, BaseMismatchError, ConfigError) as error:
        _tell(f"{file} is not used: {error}")
        return None
    return basis


def _tell(text: str) -> None:
    if is_main_process():
        print(f"secura-train: {text}", file=sys.stderr)
