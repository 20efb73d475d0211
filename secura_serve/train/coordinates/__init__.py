"""Natural coordinates: U is trained where equal steps cost the base equally much."""

from __future__ import annotations

from secura_serve.train.coordinates.moments import Moments, measure_moments
from secura_serve.train.coordinates.natural import set_natural_coordinates

__all__ = ["Moments", "measure_moments", "set_natural_coordinates"]
