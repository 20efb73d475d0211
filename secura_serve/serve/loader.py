"""``--load-format secura``: adapters are folded into the weights while vLLM loads them.

    vllm serve BASE --load-format secura \\
        --model-loader-extra-config '{"adapter": "adapters/sentiment"}'

``adapter`` is ``folder`` or ``folder*weight``, or a list of those: one weighted sum, S-MagNorm on
the total, as ``secura-merge`` writes it. The fold sees whole tensors on their way from the file
to the model, so it knows nothing of ranks and layouts; every rank folds what it reads.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from secura_serve.errors import ConfigError
from secura_serve.merge import fold_stream, open_source, plan_fold
from secura_serve.serve.names import LOAD_FORMAT

__all__ = ["EXTRA_KEY", "SecuraModelLoader", "named_adapters", "register_loader"]

EXTRA_KEY = "adapter"


def named_adapters(extra: Mapping[str, Any]) -> list[str]:
    """Return the adapters that the extra configuration names.

    Raises:
        ConfigError: it names none.
    """
    named = extra.get(EXTRA_KEY)
    specs = [named] if isinstance(named, str) else named
    if isinstance(specs, list) and specs and all(isinstance(s, str) for s in specs):
        return specs
    raise ConfigError(
        f"--load-format {LOAD_FORMAT}: name what to fold, for instance "
        f'--model-loader-extra-config \'{{"{EXTRA_KEY}": "adapters/NAME"}}\' '
        f"(or a list; NAME*0.5 weighs); got {named!r}"
    )


class SecuraModelLoader(DefaultModelLoader):
    """vLLM's default loader with the fold in its stream of weights.

    Raises:
        ConfigError: no adapter is named.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        plain = copy.copy(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        self.specs = named_adapters(extra)
        del extra[EXTRA_KEY]
        plain.load_format, plain.model_loader_extra_config = "auto", extra
        super().__init__(plain)

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Yield the base's tensors by checkpoint name, with the adapters folded into them.

        What is folded is rounded once, to the engine's dtype.

        Raises:
            MergeError: another base, a damaged adapter, NaN, or a target that never came.
        """
        plan = plan_fold(open_source(model_config.model, self.specs), model_config.dtype)
        yield from fold_stream(super().get_all_weights(model_config, model), plan)


@cache
def register_loader() -> None:
    """Make the format known to vLLM in this process; safe to call again."""
    register_model_loader(LOAD_FORMAT)(SecuraModelLoader)
