"""Setting the coordinates of a run, from moments that are measured once for a base and a basis."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from secura_serve.bases import EMBEDDED, cache_root
from secura_serve.errors import ConfigError
from secura_serve.method import gather, natural_coordinates
from secura_serve.system.atomic import only_writer, write_whole
from secura_serve.train.base_digest import base_digest
from secura_serve.train.coordinates.kept import encode_moments, read_moments
from secura_serve.train.coordinates.moments import Moments, measure_moments
from secura_serve.train.data import sample_base_text
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.output.checkpoints import is_main_process
from secura_serve.train.tuner import SecuraLayer, adapter_layers

__all__ = ["set_natural_coordinates"]

SHIPPED = Path(__file__).parent
"""Holds, for the embedded base, what the first run of rank 32 in float32 kept in its cache."""
_TEXT = {"sequences": 64, "length": 96, "seed": 0}
"""As for a calibrated basis."""
_NAME = "default"


def set_natural_coordinates(prepared: PreparedModel, damping: float) -> None:
    """Give every layer of a new adapter its :func:`~secura_serve.method.natural_coordinates`.

    The moments are kept in the cache folder: they take a forward and a backward pass over 64 texts
    that the base writes before. The random numbers of the caller are left as they were.

    Raises:
        ConfigError: a layer carries nothing on the base's own text.
    """
    layers = adapter_layers(prepared.model, _NAME)
    for module, moments in _moments(prepared, layers).items():
        layer = layers[module]
        C, R = gather(layer.pristine, layer.basis(_NAME))
        try:
            found = natural_coordinates(
                C.cpu(), R.cpu(), moments.gradients, moments.inputs, damping
            )
        except ConfigError as error:
            raise ConfigError(f"{module}: {error}; use --coordinates plain") from error
        layer.set_coordinates(_NAME, found)


def _moments(prepared: PreparedModel, layers: dict[str, SecuraLayer]) -> dict[str, Moments]:
    """Return the moments that are shipped or in the cache; measure them where they are neither."""
    file = cache_root() / "moments" / f"{_key(prepared, layers)}.safetensors"
    places = [file]
    if prepared.model_id == EMBEDDED:
        # Whatever the dtype and the machine of this run. For no other base: a fine-tune of it may
        # have the same weights in these layers, and other moments.
        places.insert(0, SHIPPED / f"{EMBEDDED}.safetensors")
    for place in places:
        # Without a lock, which takes a folder that can be written.
        if (kept := read_moments(place, layers, _NAME)) is not None:
            return kept
    try:
        # Several processes of a run need the same ones: one measures, the others wait.
        with only_writer(file, wait=True):
            if (kept := read_moments(file, layers, _NAME)) is None:
                if is_main_process():
                    print(
                        "secura-train: natural coordinates: what this basis sees of the base's own "
                        f"text is measured once and kept in {file}",
                        file=sys.stderr,
                    )
                kept = _measure(prepared, layers)
                with suppress(OSError, SafetensorError):
                    write_whole(file, encode_moments(kept, layers, _NAME))
            return kept
    # A cache that cannot be written costs the next run the minutes again, and nothing else.
    except OSError:
        return _measure(prepared, layers)


def _measure(prepared: PreparedModel, layers: dict[str, SecuraLayer]) -> dict[str, Moments]:
    model = prepared.model.get_base_model()
    with prepared.model.disable_adapter():
        text = sample_base_text(model, prepared.tokenizer, **_TEXT)
        measured = measure_moments(model, text, layers, _NAME)
    # Rounded as in the file, so that later runs give the bits of the one that measured.
    return {
        module: Moments(*(part.float().double() for part in (sums.inputs, sums.gradients)))
        for module, sums in measured.items()
    }


def _key(prepared: PreparedModel, layers: dict[str, SecuraLayer]) -> str:
    digest = hashlib.sha256(base_digest(prepared).encode())
    digest.update(json.dumps(_TEXT, sort_keys=True).encode())
    for module, layer in sorted(layers.items()):
        digest.update(f"{module} {[part.tolist() for part in layer.basis(_NAME)]}".encode())
    return digest.hexdigest()[:32]
