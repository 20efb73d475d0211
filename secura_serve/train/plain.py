"""Plain PEFT adapters on a model, to be compared with ours."""

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
        tuned: PeftModel | None = None
        for name, folder in folders.items():
            try:
                if tuned is None:
                    tuned = PeftModel.from_pretrained(model, folder, self._alias[name])
                else:
                    tuned.load_adapter(folder, self._alias[name])
            except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise EvaluationError(f"{name} does not fit the base: {reason}") from error
        assert tuned is not None
        self._tuned = tuned

    def switch(self, name: str | None, fold: bool) -> None:
        """Answer as ``name``, or as the base; nothing is folded."""
        if name is None:
            self._tuned.base_model.disable_adapter_layers()
        else:
            self._tuned.base_model.enable_adapter_layers()
            self._tuned.set_adapter(self._alias[name])
