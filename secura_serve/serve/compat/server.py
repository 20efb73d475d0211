"""In the API server's process: vLLM's command line and its table of models."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from secura_serve.errors import IncompatibleVLLMError
from secura_serve.serve.compat.names import CONTEXTS, SUPPORTED, find, vllm_version

__all__ = [
    "ListedModel",
    "ServedModels",
    "ask_engines",
    "background_tasks",
    "device_type",
    "first_token_seconds",
    "make_arg_parser",
    "log_by_file",
    "name_process",
    "show_adapters_as",
    "start_processes_by",
    "supports_adapters",
    "yields_deltas",
]


@dataclass(frozen=True)
class ListedModel:
    """What ``/v1/models`` says of one adapter."""

    name: str
    root: Path
    status: str


class ServedModels:
    """The table of model names behind ``/v1/models`` and the routing of requests.

    Takes over ``lora_requests``, ``show_available_models`` and ``model_name`` of the one
    ``OpenAIServingModels`` of a server; its ``base_model_paths`` says which names run on the
    engine's weights as they are.

    Args:
        models: vLLM's.
        adapters: the table that vLLM looks an adapter's name up in.
        base_status: what ``/v1/models`` says of the base.
        listed: the adapters to list.
        may_ask: whether whoever asks for the list may ask for the base under this name.
    """

    def __init__(
        self,
        models: Any,
        adapters: dict[str, Any],
        base_status: Callable[[], str],
        listed: Callable[[], Iterable[ListedModel]],
        may_ask: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._models, self._original = models, models.show_available_models
        self._model_name = models.model_name
        self._bases = list(models.base_model_paths)
        self._adapters, self._base_status, self._listed = adapters, base_status, listed
        self._may_ask = may_ask
        self._base_cards: list[Any] = []

    async def take_over(self) -> None:
        """Put the table in place; before the first request."""
        self._base_cards = (await self._original()).data
        self._models.lora_requests = self._adapters
        self._models.show_available_models = self._show
        self._models.model_name = self._plain_name

    def answer_as(self, folded: tuple[str, str] | None) -> None:
        """Serve the engine's weights under this (name, folder) alone; None: as it was."""
        if folded is None:
            self._models.base_model_paths[:] = self._bases
            self._models.lora_requests = self._adapters
            return
        one = type(self._bases[0])(name=folded[0], model_path=folded[1])
        self._models.base_model_paths[:] = [one]
        self._models.lora_requests = {}

    def _plain_name(self, lora_request: Any = None) -> str:
        """Return what an answer calls its model: the adapter's name, without the version; of a mix
        its canonical form."""
        name = str(self._model_name(lora_request))
        return name if lora_request is None else name.rpartition("@")[0] or name

    async def _show(self) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        parent = self._bases[0].name
        bases = [card for card in self._base_cards if self._may_ask(card.id)]
        cards = [card.model_copy(update={"status": self._base_status()}) for card in bases]
        for model in self._listed():
            card = ModelCard(
                id=model.name, root=str(model.root), parent=parent, permission=[ModelPermission()]
            )
            cards.append(card.model_copy(update={"status": model.status}))
        listed = await self._original()
        listed.data = cards
        return listed


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


def yields_deltas(sampling_params: Any) -> bool:
    """Return whether each part of an answer holds the new text only, not all text so far."""
    from vllm.sampling_params import RequestOutputKind

    return bool(sampling_params.output_kind == RequestOutputKind.DELTA)


def show_adapters_as(label: Callable[[str], str]) -> None:
    """Have vLLM's own metric of running adapters show ``label(name)`` for a name; safe to repeat.

    Every name that was ever shown stays among its labels.
    """
    states = find("vllm.v1.metrics.stats:LoRARequestStates")
    original = getattr(states._request_update, "original", states._request_update)

    def _request_update(
        self: Any, req_id: str, lora_name: str | None, waiting: bool, running: bool
    ) -> None:
        shown = lora_name and label(lora_name)
        original(self, req_id, shown, waiting=waiting, running=running)

    _request_update.original = original  # type: ignore[attr-defined]
    states._request_update = _request_update


def first_token_seconds(answer: Any) -> float | None:
    """Return the time from a request's arrival to its first token, as vLLM has measured it; None
    where it does not (``--disable-log-stats``) or there is no token yet."""
    return getattr(answer.metrics, "first_token_latency", None) or None


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


def log_by_file(args: Any, file: str) -> None:
    """Have vLLM's processes and uvicorn log as a file says.

    Args:
        args: vLLM's ``serve`` namespace.
        file: holds a ``dictConfig`` as JSON.
    """
    try:
        from vllm.config.logging import LoggingConfig
    except ImportError:
        # Before LoggingConfig there was the flag --log-config-file.
        args.log_config_file = file
        return
    args.logging_config = LoggingConfig(pylogging_config_file=file)


def start_processes_by(context: Callable[[], Any]) -> None:
    """Have vLLM start the engine process, and that one its workers, by a context of ours.

    Args:
        context: makes what ``multiprocessing.get_context`` would return.
    """
    for name in CONTEXTS:
        module = importlib.import_module(name.partition(":")[0])
        module.get_mp_context = context  # type: ignore[attr-defined]


def name_process(name: str) -> None:
    """Have ``ps`` show this process as vLLM's others, ``VLLM::name``."""
    from vllm.utils.system_utils import set_process_title

    set_process_title(name)


def device_type() -> str:
    """Return what torch calls the kind of device that vLLM's workers run on, such as ``"cuda"``."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


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


async def ask_engines(engine: Any, method: str, args: tuple[Any, ...]) -> list[list[Any]]:
    """Call a method of every worker and return what the ranks of each engine answer.

    Of several engines (data parallelism), vLLM's ``collective_rpc`` tells the first one's answers.

    Args:
        engine: vLLM's ``EngineClient``.
    """
    core = engine.engine_core
    if len(core.core_engines) < 2:
        return [await engine.collective_rpc(method, args=args)]
    ask = partial(core._call_utility_async, "collective_rpc", method, None, args, None)
    return list(await asyncio.gather(*(ask(engine=each) for each in core.core_engines)))
