"""From settings to a running server, in stages.

Base -> checkpoint -> catalog of adapters -> shared basis -> vLLM's arguments -> server. Everything
up to the basis works without vLLM (``--check``).
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from secura_serve.adapter import Adapter
from secura_serve.bases import ResolvedBase, cache_root, resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterError, ConfigError
from secura_serve.serve.app.catalog import Catalog, examine, scan
from secura_serve.serve.app.config import ServeConfig
from secura_serve.serve.app.http.access import page_access
from secura_serve.serve.app.memory import estimate
from secura_serve.serve.app.plain_lora import PlainLoRA
from secura_serve.serve.app.snapshots import Snapshot, SnapshotStore
from secura_serve.serve.app.startup_messages import (
    announce_fold,
    no_adapters,
    summary,
    warn_of_fewer_slots,
    warn_of_width,
)
from secura_serve.serve.app.vllm_flags import (
    check_vllm_flags,
    parse_vllm_flags,
    refuse_hiding_settings,
    server_keys,
)
from secura_serve.serve.basis import SharedBasis, refuse_full_rank
from secura_serve.serve.names import LOAD_FORMAT
from secura_serve.suggest import did_you_mean

__all__ = ["start", "verified_copy"]


def start(config: ServeConfig, vllm_flags: list[str]) -> int:
    """Serve until the server is stopped; with ``config.check`` only check the adapters.

    Args:
        vllm_flags: what the command line has beside our own flags.

    Returns:
        The exit status.

    Raises:
        SecuraError: the server cannot start, or ended on its own.
    """
    if config.check:
        _check_settings(config, vllm_flags)
    base = resolve_base(config.base)
    names = list(config.served_model_name) or [_default_name(base)]
    catalog = _catalog(config, base, names)
    if config.check:
        if not catalog.entries:
            print(no_adapters(config.adapters))
        return 1 if catalog.refused else 0
    checkpoint = Checkpoint(base.path)
    served = _prepare_vllm(checkpoint, catalog, vllm_flags)
    ours = [a for a in served if isinstance(a, Adapter)]
    loras = [a for a in served if isinstance(a, PlainLoRA)]
    basis = SharedBasis.of(ours, catalog.norm_bounds)
    warn_of_width(basis, ours)
    args = parse_vllm_flags(
        vllm_flags,
        path=base.path,
        names=names,
        served=served,
        foldable=bool(catalog.foldable),
        basis=basis,
        memory=partial(estimate, checkpoint, basis, loras),
        cache=cache_root() / "serve",
    )
    if args.load_format == LOAD_FORMAT:
        announce_fold(str(base.path), args)
    elif not catalog.entries:
        print(no_adapters(config.adapters))
    memory = estimate(checkpoint, basis, loras, slots=args.max_loras, dtype=args.dtype)
    warn_of_fewer_slots(memory, served, loras)
    # Imports of vLLM's, which the checks above do without.
    from secura_serve.serve.app.folding import Folding
    from secura_serve.serve.app.http.context import ServerContext
    from secura_serve.serve.app.http.loading import AdapterLoading
    from secura_serve.serve.app.run import run

    folding = Folding(
        base.path, names, catalog.foldable, [a.name for a in served], catalog.snapshots
    )
    loading = AdapterLoading(
        Path(config.adapters).expanduser() if config.adapters else None,
        names,
        partial(verified_copy, base=base.path, store=_store()),
        folding,
    )
    keys = server_keys(args, admin=config.admin_api_key)
    run(config, args, memory, ServerContext(folding, loading, keys, fold_at_start=config.fold))
    return 0


def _check_settings(config: ServeConfig, vllm_flags: list[str]) -> None:
    """Refuse what a start would refuse. vLLM is imported only where there are flags for it."""
    args: Any = SimpleNamespace(api_key=None)
    if vllm_flags:
        args = check_vllm_flags(vllm_flags)
    keys = server_keys(args, admin=config.admin_api_key)
    if config.ui:
        page_access(config.ui_host, login=config.ui_auth, no_login=config.ui_no_auth, keys=keys)


def _default_name(base: ResolvedBase) -> str:
    """Return a folder's last part, and what was typed for an alias or a hub id."""
    return base.path.name if base.model_id == str(base.path) else base.name


def _store() -> SnapshotStore:
    return SnapshotStore(cache_root() / "serve" / "adapters")


def _catalog(config: ServeConfig, base: ResolvedBase, names: list[str]) -> Catalog:
    """Check all adapters, print them, and refuse what the settings ask of them."""
    catalog = Catalog(())
    if config.adapters:
        store = None if config.check else _store()
        # A checkpoint of its own: what was compared stays mapped as long as it is open.
        catalog = scan(config.adapters, Checkpoint(base.path), taken=names, store=store)
        if store is not None:
            store.remove_unused()
    if catalog.entries:
        print(f"{catalog.table()}\n\n{summary(catalog, config.base)}", flush=True)
    if config.fold in {lora.name for lora in catalog.plain_loras}:
        raise ConfigError(
            f"--fold {config.fold}: a plain LoRA is chosen per request, and not folded; leave it "
            "out"
        )
    foldable = [a.name for a in catalog.foldable]
    if config.fold is not None and config.fold not in foldable:
        raise ConfigError(
            f"--fold {config.fold}: no such adapter; there are "
            f"{', '.join(foldable) or 'none (give --adapters DIR)'}"
            f"{did_you_mean(config.fold, foldable)}"
        )
    if config.strict and catalog.refused:
        raise AdapterError(
            f"--strict: {len(catalog.refused)} of {len(catalog.entries)} adapters cannot be "
            f"served: {', '.join(e.shown for e in catalog.refused)}"
        )
    return catalog


def _prepare_vllm(
    checkpoint: Checkpoint, catalog: Catalog, vllm_flags: list[str]
) -> list[Adapter | PlainLoRA]:
    """Check this vLLM and switch the plugins on; return the adapters to serve per request."""
    # vLLM's own command line sets it too: its workers must not be forked from a used process.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from secura_serve.serve import compat, plugin

    compat.check()
    plugin.choose_plugins()
    served: list[Adapter | PlainLoRA] = [*catalog.served, *catalog.plain_loras]
    if catalog.foldable or served:
        refuse_hiding_settings(vllm_flags)
    architectures = checkpoint.config.get("architectures") or []
    if not served:
        return []
    if not compat.supports_adapters(architectures):
        print(
            f"\nvLLM {compat.vllm_version()} offers no per-request adapters for "
            f"{', '.join(architectures)}: each of these answers only while it is folded "
            "(--fold NAME, or POST /admin/fold), plain LoRAs not at all"
        )
        return []
    plugin.activate()
    return served


def verified_copy(folder: Path, *, base: Path, store: SnapshotStore) -> Snapshot:
    """Copy and check an adapter that is to be loaded at run time. Raises SecuraError."""
    entry = examine(folder, Checkpoint(base), {}, store)
    if entry.adapter is not None:
        refuse_full_rank(entry.adapter)
    assert entry.snapshot is not None
    return entry.snapshot
