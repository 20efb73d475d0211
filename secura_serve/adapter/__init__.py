"""One adapter folder on disk. Needs torch and safetensors only."""

from __future__ import annotations

from secura_serve.adapter.fingerprint import fingerprint, fingerprint_of, mismatch
from secura_serve.adapter.format import FORMAT_VERSION, PEFT_TYPE, AdapterConfig, CURModule
from secura_serve.adapter.place import check_target, put_in_place, replacing
from secura_serve.adapter.size import LARGEST_RMS, gains, refuse_oversized
from secura_serve.adapter.store import (
    Adapter,
    check_name,
    is_plain_lora,
    load,
    mismatches,
    refuse_mismatches,
    save,
    verify,
)

__all__ = [
    "FORMAT_VERSION",
    "LARGEST_RMS",
    "PEFT_TYPE",
    "Adapter",
    "AdapterConfig",
    "CURModule",
    "check_name",
    "check_target",
    "fingerprint",
    "fingerprint_of",
    "gains",
    "is_plain_lora",
    "load",
    "mismatch",
    "mismatches",
    "put_in_place",
    "refuse_mismatches",
    "refuse_oversized",
    "replacing",
    "save",
    "verify",
]
