"""A base and adapters in this process, through transformers and the tuner of ``secura-train``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as hf_logging

from secura_serve.adapter import Adapter, load, verify
from secura_serve.bases import resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterError, EvaluationError
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.generate import answers
from secura_serve.evaluate.models import NEUTRAL_TOKENS, Moved
from secura_serve.evaluate.retention import retention
from secura_serve.train import SecuraConfig, SecuraLayer, SecuraModel, adapter_layers
from secura_serve.train.base import load_base

__all__ = ["Local"]


class Local:
    """One model in memory that carries every adapter, one of them active at a time.

    Raises:
        EvaluationError: adapters that do not belong to the base or are damaged, all of them.
        BaseModelError: no such base.
    """

    def __init__(self, config: EvalConfig) -> None:
        assert config.base is not None
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        self.where = "this process"
        self.base: str | None = config.base
        adapters = _checked(config.base, config.adapter)
        self.names: tuple[str, ...] = (config.base, *(a.name for a in adapters))
        self._model, self._tokenizer, _ = load_base(config.base, config.dtype, config.device)
        self._norms = {a.name: a.config.magnorm.mode for a in adapters}
        tuner = None
        for adapter in adapters:
            settings = SecuraConfig(
                r=adapter.config.r,
                target_modules=list(adapter.config.target_modules),
                selection=dict(adapter.config.selection),
                magnorm=adapter.config.magnorm.to_json(),
                inference_mode=True,
            )
            if tuner is None:
                tuner = SecuraModel(self._model, {adapter.name: settings}, adapter.name)
            else:
                tuner.peft_config[adapter.name] = settings
                tuner.inject_adapter(self._model, adapter.name)
            for module, layer in adapter_layers(self._model, adapter.name).items():
                layer.load_core(adapter.name, adapter.modules[module], settings)
        self._layers = [m for m in self._model.modules() if isinstance(m, SecuraLayer)]

    def _become(self, name: str, fold: bool = True) -> None:
        """Switch the model to base or adapter ``name``; a norm is folded into the weights, so that
        W' is made once and not at every token."""
        adapter = self._norms.get(name)
        for layer in self._layers:
            if layer.merged:
                layer.unmerge()
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter([name], inference_mode=True)
                if fold and adapter != "none":
                    layer.merge(adapter_names=[name])

    def answers(self, model: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """One greedy answer per prompt, through the chat template where there is one."""
        self._become(model)
        return answers(self._model, self._tokenizer, prompts, max_new_tokens=max_new_tokens)

    def moved(self, model: str, texts: Sequence[str]) -> Moved:
        """``model`` against the base, on every text."""

        @contextmanager
        def without() -> Iterator[None]:
            for layer in self._layers:
                layer.enable_adapters(False)
            yield
            for layer in self._layers:
                layer.enable_adapters(True)

        self._become(model, fold=False)
        found = retention(
            self._model, self._tokenizer, texts, max_tokens=NEUTRAL_TOKENS, without=without
        )
        return Moved(
            found.perplexity_ratio,
            found.base_perplexity,
            found.tokens,
            found.kl,
            found.tokens,
            None,
        )

    def harness(self, model: str) -> Any:
        """The model as lm-evaluation-harness takes it, to be used before the next call."""
        from lm_eval.models.huggingface import HFLM

        self._become(model)
        return HFLM(pretrained=self._model, tokenizer=self._tokenizer)


def _checked(base: str, folders: Sequence[str]) -> list[Adapter]:
    """The adapters, each compared with the whole base."""
    checkpoint = Checkpoint(resolve_base(base).path)
    adapters, problems = [], []
    for folder in folders:
        try:
            adapter = load(folder)
            verify(adapter, checkpoint)
            adapters.append(adapter)
        except AdapterError as error:
            problems.append(str(error))
    names = [a.name for a in adapters]
    if len({*names, base}) <= len(names):
        problems.append(f"two models of one name: {', '.join([base, *names])}")
    if problems:
        raise EvaluationError("adapters that cannot be used:", problems)
    return adapters
