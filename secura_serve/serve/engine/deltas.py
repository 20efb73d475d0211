"""Places for resident updates in this worker, and how an adapter stands for one of them.

Which update is in which place is decided by the server, which knows the requests that run; a worker
fills a place and points the slots of vLLM's adapters at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from secura_serve.serve.delta_image import DTYPES, DeltaImage
from secura_serve.serve.engine.delta_layer import DeltaLinearMixin

__all__ = ["DeltaModel", "ResidentDeltas"]

_NAME = "secura.delta"


class DeltaModel(LoRAModel):
    """What vLLM registers for an adapter whose update is resident."""

    def __init__(self, lora_id: int, place: int) -> None:
        # vLLM looks at the first module that an adapter changes: one that no model has.
        nothing = LoRALayerWeights(_NAME, 1, 1, torch.zeros(1), torch.zeros(1), scaling=1)
        super().__init__(lora_id, 1, {_NAME: nothing})
        self.place = place


class ResidentDeltas:
    """The places of all linears.

    Args:
        settings: ``resident`` of the server's settings: ``count``, ``dtype`` and ``modules``, by
            their names in the checkpoint; None where there are no places.
        slots: vLLM's adapter slots.
        active: ``()`` bool on the CPU: whether any token of a batch wants an update.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None,
        slots: int,
        device: torch.device,
        active: torch.Tensor,
    ) -> None:
        self._active = active
        self.count = settings["count"] if settings else 0
        self.modules: list[str] = settings["modules"] if settings else []
        self._dtype = DTYPES[settings["dtype"]] if settings else torch.int8
        self._layers: dict[str, DeltaLinearMixin] = {}
        self.places = torch.full((slots + 1,), -1, dtype=torch.int32, device=device)
        """Of each slot the place of its adapter's update; −1 for none."""

    def install(self, layer: DeltaLinearMixin, slices: Sequence[str | None]) -> None:
        """Make room in a linear, whose slices are these modules; None for one that stays."""
        layer.places, layer.wants_delta = self.places, self._active
        layer.install_deltas(slices, self.count, self._dtype)
        self._layers |= {module: layer for module in slices if module is not None}

    def fill(self, place: int, image: DeltaImage, first: int, last: int) -> None:
        """Copy the modules ``first`` to ``last`` of an image; the first call empties the place.

        Raises:
            StorageError: the image cannot be read.
            UnservableError: it is not of this model.
        """
        if first == 0:
            for layer in self._layers.values():
                layer.clear_delta(place)
        for module, weight, scale in image.read(image.modules[first:last]):
            self._layers[module].put_delta(place, module, weight, scale)
