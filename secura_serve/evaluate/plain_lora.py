"""Plain PEFT adapters on a model, to compare with CUR adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from secura_serve.errors import EvaluationError

__all__ = ["LoRAs"]


class LoRAs:
    """LoRA and DoRA adapters on one model, which is changed in place.

    Args:
        folders: name -> folder, at least one.

    Raises:
        EvaluationError: one does not fit the model.
    """

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        # PEFT allows no dots in an adapter's name, and folders have some.
        self._alias = {name: f"lora_{n}" for n, name in enumerate(folders)}
        adapted: PeftModel | None = None
        for name, folder in folders.items():
            try:
                if adapted is None:
                    adapted = PeftModel.from_pretrained(model, folder, self._alias[name])
                else:
                    adapted.load_adapter(folder, self._alias[name])
            except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise EvaluationError(f"{name} does not fit the base: {reason}") from error
        assert adapted is not None
        self._adapted = adapted

    def switch(self, name: str | None, fold: bool) -> None:
        """Answer as ``name``, or as the base; ``fold`` has no effect here."""
        if name is None:
            self._adapted.base_model.disable_adapter_layers()
        else:
            self._adapted.base_model.enable_adapter_layers()
            self._adapted.set_adapter(self._alias[name])
