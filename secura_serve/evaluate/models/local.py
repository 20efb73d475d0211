"""A base and adapters in this process, through transformers and the tuner of ``secura-train``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as hf_logging

from secura_serve.adapter import Adapter, is_plain_lora, load, verify
from secura_serve.adapter.format import CONFIG_NAME
from secura_serve.bases import resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterError, EvaluationError
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.metrics.retention import retention
from secura_serve.evaluate.models.base import NEUTRAL_TOKENS, Drift
from secura_serve.evaluate.models.generate import answers
from secura_serve.evaluate.plain_lora import LoRAs
from secura_serve.train import SecuraConfig, SecuraLayer, SecuraModel, adapter_layers
from secura_serve.train.methods.base import load_base

__all__ = ["Local", "check_adapters"]


class _CUR:
    """CUR adapters on a model, one of them active at a time."""

    def __init__(self, model: Any, adapters: Sequence[Adapter]) -> None:
        norms = {a.name: a.config.magnorm for a in adapters}
        # What acts on activations has no W', and answers as it was trained.
        self._folded = {n for n, norm in norms.items() if norm.foldable and not norm.additive}
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
                tuner = SecuraModel(model, {adapter.name: settings}, adapter.name)
            else:
                tuner.peft_config[adapter.name] = settings
                tuner.inject_adapter(model, adapter.name)
            for module, layer in adapter_layers(model, adapter.name).items():
                layer.load_core(adapter.name, adapter.modules[module], settings)
        self._layers = [m for m in model.modules() if isinstance(m, SecuraLayer)]

    def switch(self, name: str | None, fold: bool) -> None:
        """Answer as ``name``, or as the base; a norm is folded into the weights if asked, so that
        W' is made once and not at every token."""
        for layer in self._layers:
            if layer.merged:
                layer.unmerge()
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([name], inference_mode=True)
                if fold and name in self._folded:
                    layer.merge(adapter_names=[name])


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
        adapters, loras = check_adapters(config.base, config.adapter)
        self.names: tuple[str, ...] = (config.base, *(a.name for a in adapters), *loras)
        self._model, self._tokenizer, _ = load_base(config.base, config.dtype, config.device)
        self._adapters = LoRAs(self._model, loras) if loras else _CUR(self._model, adapters)
        self._model.eval()

    def _become(self, name: str, fold: bool = True) -> None:
        self._adapters.switch(None if name == self.base else name, fold)

    def answers(self, model: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return one greedy answer per prompt, through the chat template where there is one."""
        self._become(model)
        return answers(self._model, self._tokenizer, prompts, max_new_tokens=max_new_tokens)

    def drift(self, model: str, texts: Sequence[str]) -> Drift:
        """Compare ``model`` with the base, on every text."""

        @contextmanager
        def without() -> Iterator[None]:
            self._adapters.switch(None, False)
            yield
            self._become(model, fold=False)

        self._become(model, fold=False)
        measured = retention(
            self._model, self._tokenizer, texts, max_tokens=NEUTRAL_TOKENS, without=without
        )
        return Drift(
            measured.perplexity_ratio,
            measured.base_perplexity,
            measured.tokens,
            measured.kl,
            measured.tokens,
            None,
        )

    def harness(self, model: str) -> Any:
        """Return the model as lm-evaluation-harness takes it, to be used before the next call."""
        from lm_eval.models.huggingface import HFLM

        self._become(model)
        return HFLM(pretrained=self._model, tokenizer=self._tokenizer)


def check_adapters(base: str, folders: Sequence[str]) -> tuple[list[Adapter], dict[str, Path]]:
    """Return the CUR adapters, each compared with the whole base, and the folders of LoRAs.

    Raises:
        EvaluationError: adapters that do not exist, are damaged or do not belong to the base, all
            of them.
        BaseModelError: no such base.
    """
    wrong_use = False
    checkpoint = Checkpoint(resolve_base(base).path)
    adapters, loras, problems = [], dict[str, Path](), []
    for folder in folders:
        path = Path(folder).absolute()
        try:
            if is_plain_lora(path):
                loras[path.name] = path
                continue
            if (path / "config.json").is_file() and not (path / CONFIG_NAME).exists():
                problems.append(f"{path.name} is a whole checkpoint; give it as --base")
                continue
            adapter = load(folder)
            verify(adapter, checkpoint)
            adapters.append(adapter)
        except AdapterError as error:
            wrong_use |= error.wrong_use
            problems.append(str(error))
    names = [*(a.name for a in adapters), *loras]
    if len({*names, base}) <= len(names) or len(names) + len(problems) < len(folders):
        problems.append(f"two models of one name: {', '.join([base, *folders])}")
    if adapters and loras:
        problems.append(
            f"{', '.join(loras)}: PEFT puts LoRA and CUR adapters on models of their own; use one "
            "run for each, with one --base"
        )
    if problems:
        raise EvaluationError("adapters that cannot be used:", problems, wrong_use=wrong_use)
    return adapters, loras
