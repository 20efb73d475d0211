"""One adapter folder on disk. Needs torch only, and safetensors and blake3 where files are read or
written: they are imported there, so that the kernels of a fold run where there is nothing else."""

from __future__ import annotations

from secura_serve.adapter.basis_file import CalibratedBasis, load_basis, weight_fingerprint
from secura_serve.adapter.fingerprint import fingerprint, fingerprint_of
from secura_serve.adapter.format import (
    FORMAT_VERSION,
    PEFT_TYPE,
    AdapterConfig,
    weights_digest,
)
from secura_serve.adapter.identity import base_id
from secura_serve.adapter.limits import LARGEST_RMS, refuse_oversized, update_sizes
from secura_serve.adapter.store import (
    Adapter,
    check_name,
    holds_its_weights,
    is_plain_lora,
    load,
    load_config,
    save,
)
from secura_serve.adapter.tensors import CURModule, parse_modules
from secura_serve.adapter.verify import (
    BaseComparison,
    WeightSource,
    compare_modules,
    compare_with_base,
    gather_verified,
    mismatch_message,
    refuse_mismatches,
    verify,
)

__all__ = [
    "FORMAT_VERSION",
    "LARGEST_RMS",
    "PEFT_TYPE",
    "Adapter",
    "AdapterConfig",
    "BaseComparison",
    "CURModule",
    "CalibratedBasis",
    "WeightSource",
    "base_id",
    "check_name",
    "compare_modules",
    "compare_with_base",
    "fingerprint",
    "fingerprint_of",
    "gather_verified",
    "holds_its_weights",
    "is_plain_lora",
    "load",
    "load_basis",
    "load_config",
    "mismatch_message",
    "parse_modules",
    "refuse_mismatches",
    "refuse_oversized",
    "save",
    "update_sizes",
    "verify",
    "weight_fingerprint",
    "weights_digest",
]
