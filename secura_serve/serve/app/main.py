"""``secura-serve``: one base, a folder of adapters, vLLM's own server in this process.

``main`` walks through the rooms in order: base -> checkpoint -> catalog -> shared basis -> vLLM's
arguments -> chat page -> vLLM. Everything up to the basis works without vLLM (``--check``).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secura_serve.adapter import Adapter
from secura_serve.bases import ResolvedBase, cache_root, resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import ConfigError, EngineError, FoldError, SecuraError
from secura_serve.serve.app.catalog import Catalog, scan
from secura_serve.serve.app.chat_page import ChatPage
from secura_serve.serve.app.http.access import Keys, PageAccess, page_access
from secura_serve.serve.app.lifecycle.engine_health import EngineHealth
from secura_serve.serve.app.lifecycle.start_signals import stop_cleanly_during_start
from secura_serve.serve.app.memory import Memory, estimate, kv_cache_gib
from secura_serve.serve.app.options import (
    refuse_what_hides_adapters,
    secura_parser,
    server_keys,
    vllm_arguments,
    vllm_help,
)
from secura_serve.serve.app.plain_lora import PlainLoRA
from secura_serve.serve.app.snapshots import SnapshotStore
from secura_serve.serve.app.startup_messages import (
    announce_fold,
    nothing,
    tell_of_slots,
    warn_of_width,
    who_can_reach,
)
from secura_serve.serve.basis import SharedBasis
from secura_serve.serve.names import LOAD_FORMAT

__all__ = ["main"]

# Seconds that a client has to take what is left of its answer once the server has ended; without a
# limit one that does not read would hold it.
_LAST_BYTES = 5
_ENGINE_STOP_S = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``secura-serve``. Returns the exit status; errors go to stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(flag.startswith("--help=") for flag in arguments):
            vllm_help(arguments)
        return _run(*secura_parser().parse_known_args(arguments))
    except SecuraError as error:
        print(f"secura-serve: {error}", file=sys.stderr)
        return 1


def _run(known: argparse.Namespace, rest: list[str]) -> int:
    if known.adapters == "":
        raise ConfigError("--adapters is empty; name a folder, or leave the flag out")
    base = resolve_base(known.base)
    checkpoint = Checkpoint(base.path)
    names = known.served_model_name or [_name(base)]
    catalog = Catalog(())
    if known.adapters:
        # One of its own: what it has compared stays mapped as long as it is open.
        store = None if known.check else SnapshotStore(cache_root() / "serve" / "adapters")
        catalog = scan(known.adapters, Checkpoint(base.path), taken=names, store=store)
        if store is not None:
            store.remove_unused()
    if catalog.entries:
        print(catalog.table(), flush=True)
        only = len(catalog.foldable) - len(catalog.served)
        per_request = len(catalog.served) + len(catalog.plain_loras)
        print(
            f"\n{per_request} servable on {known.base} per request, {only} by folding, "
            f"{len(catalog.refused)} not",
            flush=True,
        )
    if known.fold in {lora.name for lora in catalog.plain_loras}:
        raise ConfigError(
            f"--fold {known.fold}: a plain LoRA is chosen per request, and not folded; leave it out"
        )
    if known.fold is not None and known.fold not in {a.name for a in catalog.foldable}:
        raise ConfigError(
            f"--fold {known.fold}: no such adapter; there are "
            f"{', '.join(a.name for a in catalog.foldable) or 'none (give --adapters DIR)'}"
        )
    if known.strict and catalog.refused:
        raise ConfigError(
            f"--strict: {len(catalog.refused)} of {len(catalog.entries)} adapters cannot be "
            f"served: {', '.join(e.shown for e in catalog.refused)}"
        )
    if known.check:
        if not catalog.entries:
            print(nothing(known.adapters))
        return 1 if catalog.refused else 0
    served = _prepare_vllm(checkpoint, catalog, rest)
    ours = [a for a in served if isinstance(a, Adapter)]
    basis = SharedBasis.of(ours, catalog.gains)
    warn_of_width(basis, ours)
    loras = [a for a in served if isinstance(a, PlainLoRA)]
    args = vllm_arguments(
        rest,
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
        print(nothing(known.adapters))
    memory = estimate(checkpoint, basis, loras, slots=args.max_loras, dtype=args.dtype)
    tell_of_slots(memory, served, loras)
    from secura_serve.serve.app.folding import Folding
    from secura_serve.serve.app.http.endpoints import configure

    folding = Folding(
        base.path, names, catalog.foldable, [a.name for a in served], catalog.snapshots
    )
    keys = server_keys(args, admin=known.admin_api_key)
    configure(folding, keys=keys, at_start=known.fold)
    _serve(known, args, memory, keys)
    if folding.broken is not None:
        raise FoldError(folding.broken)
    return 0


def _name(base: ResolvedBase) -> str:
    """A folder answers under its last part; an alias and a hub id under what was typed."""
    return base.path.name if base.model_id == str(base.path) else base.name


def _prepare_vllm(
    checkpoint: Checkpoint, catalog: Catalog, rest: list[str]
) -> list[Adapter | PlainLoRA]:
    """Check this vLLM and switch the plugins on; returns the adapters to serve per request."""
    # vLLM's own command line sets it too: its workers must not be forked from a used process.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from secura_serve.serve import compat, plugin

    compat.check()
    plugin.choose_plugins()
    served: list[Adapter | PlainLoRA] = [*catalog.served, *catalog.plain_loras]
    if catalog.foldable or served:
        refuse_what_hides_adapters(rest)
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


def _serve(known: argparse.Namespace, args: Any, memory: Memory, keys: Keys) -> None:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
    from vllm.platforms import current_platform

    from secura_serve.serve.app.lifecycle.draining import MIDDLEWARE, Shutdown
    from secura_serve.serve.app.lifecycle.write_deadline import http_protocol

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib(memory)))
    scheme = "https" if args.ssl_certfile else "http"
    reachable = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    endpoint = f"{scheme}://{reachable}:{args.port}"
    examples = Path(known.adapters) / "examples.json" if known.adapters else None
    access = None
    if not known.no_ui:
        access = page_access(
            known.ui_host, login=known.ui_auth, no_login=known.ui_no_auth, keys=keys
        )
    page = ChatPage(
        endpoint,
        access=access or PageAccess(),
        port=known.ui_port,
        api_key=keys.user[0] if keys.user else None,
        examples=examples if examples and examples.is_file() else None,
        enabled=access is not None,
    )
    page.check_port()
    try:
        address, socket = setup_server(args, reuse_port=False)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {args.host}:{args.port} ({error}); choose another --port"
        ) from error
    print(f"\n{who_can_reach(args, keys, access, known.ui_port)}")
    print(f"\nmemory: {memory}\nstarting; the endpoint will be {endpoint}/v1", flush=True)
    stop_cleanly_during_start()
    args.middleware = [*args.middleware, MIDDLEWARE]
    with page, EngineHealth() as health:
        shutdown = Shutdown(args.shutdown_timeout, health)
        # The engine process needs a moment to remove what it shares with its workers.
        args.shutdown_timeout = max(args.shutdown_timeout, _ENGINE_STOP_S)
        try:
            uvloop.run(
                run_server_worker(
                    address,
                    socket,
                    args,
                    timeout_graceful_shutdown=_LAST_BYTES,
                    http=http_protocol(known.write_timeout),
                )
            )
        except ValueError as error:
            raise ConfigError(f"vLLM does not accept these settings: {error}") from error
        except RuntimeError as error:
            if (cause := health.reported()) is None:
                raise
            raise EngineError(f"the engine did not start: {cause}") from error
        finally:
            # vLLM takes the heap out of garbage collection; at exit, what is never collected would
            # be reported as leaked.
            gc.unfreeze()
    if shutdown.engine_died is not None:
        raise EngineError(f"the engine died: {shutdown.engine_died}")
