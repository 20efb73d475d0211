"""In the API server's process: vLLM's command line and its table of models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secura_serve.errors import IncompatibleVLLMError
from secura_serve.serve.compat.names import SUPPORTED, vllm_version

__all__ = ["ServedModels", "background_tasks", "make_arg_parser", "supports_adapters"]


class ServedModels:
    """The table of model names behind ``/v1/models`` and the routing of requests.

    Takes over ``show_available_models`` of the one ``OpenAIServingModels`` of a server; its
    ``base_model_paths`` says which names run on the engine's weights as they are.
    """

    def __init__(self, models: Any) -> None:
        self._models, self._original = models, models.show_available_models
        self._bases = list(models.base_model_paths)
        self.adapters: Mapping[str, Any] = models.lora_requests
        """Name -> LoRARequest of what can be chosen per request; vLLM changes it in place."""
        self._status: Callable[[str], str] = lambda name: "ready"
        self._more: list[Any] = []
        self._root: Callable[[str], Path | None] = lambda name: None
        self._before: list[Any] | None = None
        models.show_available_models = self._show

    def describe(
        self,
        status: Callable[[str], str],
        more: Sequence[tuple[str, Path]],
        root: Callable[[str], Path | None],
    ) -> None:
        """Add what ``/v1/models`` should say and vLLM does not know.

        Args:
            status: of every entry.
            more: entries of (name, folder).
            root: the folder to show for a name, in the place of the one that vLLM loads from.
        """
        from vllm.entrypoints.serve.engine.protocol import ModelCard

        self._status, self._root, parent = status, root, self._bases[0].name
        self._more = [ModelCard(id=name, root=str(path), parent=parent) for name, path in more]

    async def answer_as(self, folded: tuple[str, str] | None) -> None:
        """Serve the engine's weights under this (name, folder) alone; None: as it was."""
        if folded is None:
            self._models.base_model_paths[:] = self._bases
            self._models.lora_requests, self._before = self.adapters, None
            return
        if self._before is None:
            self._before = (await self._original()).data
        one = type(self._bases[0])(name=folded[0], model_path=folded[1])
        self._models.base_model_paths[:] = [one]
        self._models.lora_requests = {}

    async def _show(self) -> Any:
        listed = await self._original()
        cards = listed.data if self._before is None else self._before
        listed.data = [self._described(card) for card in (*cards, *self._more)]
        return listed

    def _described(self, card: Any) -> Any:
        update = {"status": self._status(card.id)}
        if (root := self._root(card.id)) is not None:
            update["root"] = str(root)
        return card.model_copy(update=update)


def background_tasks(state: Any) -> Callable[[], Iterable[Any]]:
    """Return a view of the tasks that ``/v1/responses`` runs after it has answered.

    Raises:
        IncompatibleVLLMError: this vLLM keeps them elsewhere.
    """
    responses = getattr(state, "openai_serving_responses", None)
    if responses is None:
        return tuple
    if not isinstance(getattr(responses, "background_tasks", None), dict):
        raise IncompatibleVLLMError(
            f"vLLM {vllm_version()}: OpenAIServingResponses.background_tasks is gone; supported: "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}"
        )
    return lambda: responses.background_tasks.values()


def make_arg_parser() -> tuple[Any, Callable[[Any], None]]:
    """Return the parser of ``vllm serve`` and its check; their module moved in 0.33."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for module in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args"):
        try:
            cli_args = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        parser = FlexibleArgumentParser(prog="secura-serve", add_json_tip=False)
        return cli_args.make_arg_parser(parser), cli_args.validate_parsed_serve_args
    raise IncompatibleVLLMError(
        f"vLLM {vllm_version()}: make_arg_parser is neither in launchers.cli_args nor in "
        f"common.cli_args; supported: >={SUPPORTED[0]},<{SUPPORTED[1]}"
    )


def supports_adapters(architectures: list[str]) -> bool:
    """Return whether vLLM declares adapter support for this model class; True if not registered.

    (An unregistered class goes through vLLM's Transformers backend, which supports adapters.)
    """
    from vllm.model_executor.models import ModelRegistry, supports_lora

    for name in architectures:
        entry = ModelRegistry.models.get(name)
        if entry is not None:
            return bool(supports_lora(entry.load_model_cls()))
    return True
