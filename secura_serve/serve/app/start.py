"""From settings to a running server, in stages.

Base -> checkpoint -> catalog of adapters -> shared basis -> vLLM's arguments -> server. Everything
up to the basis works without vLLM (``--check``).
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from secura_serve.adapter import Adapter
from secura_serve.bases import ResolvedBase, cache_root, resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterError, ConfigError
from secura_serve.serve import fork_server
from secura_serve.serve.app.adapters.content.catalog import Catalog, scan
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.app.adapters.content.verified import Verified
from secura_serve.serve.app.adapters.content.verifier import Verifier
from secura_serve.serve.app.adapters.library import Library
from secura_serve.serve.app.adapters.reserve import DEFAULT_RANK, reserved_basis
from secura_serve.serve.app.adapters.resident.plan import plan_resident
from secura_serve.serve.app.adapters.resident.slots import ResidentSlots, ResidentSpec
from secura_serve.serve.app.adapters.state import StateFile
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.adapters.watch import FolderWatch
from secura_serve.serve.app.config import ServeConfig
from secura_serve.serve.app.http.access import page_access
from secura_serve.serve.app.http.key_file import read_keys
from secura_serve.serve.app.memory import estimate
from secura_serve.serve.app.startup_messages import (
    announce_fold,
    no_adapters,
    summary,
    tell_of_places,
    warn_of_fewer_slots,
    warn_of_width,
)
from secura_serve.serve.app.vllm_flags import (
    check_vllm_flags,
    parse_vllm_flags,
    refuse_hiding_settings,
    server_keys,
)
from secura_serve.serve.basis import SharedBasis
from secura_serve.serve.logs import say
from secura_serve.serve.names import LOAD_FORMAT
from secura_serve.suggest import did_you_mean

if TYPE_CHECKING:
    from secura_serve.serve.app.http.context import ServerContext

__all__ = ["start"]


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
    elif config.keys:
        # Before the adapters are verified, which may take a while.
        read_keys(Path(os.path.expanduser(config.keys)))
    forked = not config.check and _start_importing(vllm_flags)
    base = resolve_base(config.base)
    names = list(config.served_model_name) or [_default_name(base)]
    verifier = _verifier(config, base)
    catalog = _catalog(config, base, names, verifier)
    if config.check:
        if not catalog.entries:
            say(no_adapters(config.adapters), prefix="")
        return 1 if catalog.refused else 0
    checkpoint = Checkpoint(base.path)
    served: list[Adapter | PlainLoRA] = [*catalog.served, *catalog.plain_loras]
    _prepare_vllm(forked)
    per_request = config.adapters is not None and _takes_adapters(checkpoint, served, vllm_flags)
    ours = catalog.served if per_request else []
    loras = catalog.plain_loras if per_request else []
    basis = SharedBasis.of(ours, catalog.norm_bounds)
    warn_of_width(basis, ours)
    if per_request:
        rank = config.reserve_rank
        if rank is None:
            rank = 0 if served else DEFAULT_RANK
        if rank:
            basis = basis.with_more(reserved_basis(checkpoint, rank))
    resident = ResidentSpec(0, config.resident_dtype, ())
    if per_request:
        resident = plan_resident(
            config.resident, config.resident_dtype, catalog.full_rank, checkpoint
        )
        tell_of_places(resident, catalog.full_rank)
    args = parse_vllm_flags(
        vllm_flags,
        path=base.path,
        names=names,
        served=served if per_request else [],
        per_request=per_request,
        foldable=config.adapters is not None,
        basis=basis,
        resident=resident,
        memory=partial(estimate, checkpoint, basis, loras, resident=resident),
        cache=cache_root() / "serve",
    )
    if args.load_format == LOAD_FORMAT:
        announce_fold(str(base.path), args)
    elif not catalog.entries:
        say(no_adapters(config.adapters), prefix="")
    memory = estimate(
        checkpoint, basis, loras, slots=args.max_loras, dtype=args.dtype, resident=resident
    )
    if per_request:
        warn_of_fewer_slots(memory, served, loras)
    # Imports of vLLM's, which the checks above do without.
    from secura_serve.serve.app.run import run

    context = _context(config, args, base, names, catalog, verifier, per_request, resident)
    run(config, args, memory, context)
    return 0


def _context(
    config: ServeConfig,
    args: Any,
    base: ResolvedBase,
    names: list[str],
    catalog: Catalog,
    verifier: Verifier,
    per_request: bool,
    resident: ResidentSpec,
) -> ServerContext:
    """Put the parts of the server together."""
    from secura_serve.serve.app.answers import Answers
    from secura_serve.serve.app.folding import Folding
    from secura_serve.serve.app.http.context import ServerContext
    from secura_serve.serve.app.metrics import Metrics

    metrics = Metrics()
    root = Path(os.path.expanduser(config.adapters)).absolute() if config.adapters else None
    library = Library(names, keep=config.adapter_versions)
    answers = Answers(names, library, per_request=per_request)
    folding = Folding(base.path, answers, metrics)
    state = StateFile(_state_path(config, args, root)) if root is not None else None
    updates = AdapterUpdates(
        root, library, verifier, state, folding.admission.ended, observer=metrics
    )
    updates.folded = folding.held
    if resident.count:
        assert verifier.images is not None
        updates.residency.places = ResidentSlots(resident, verifier.images, metrics)
        updates.mixes.resident = updates.residency.places
    if state is not None and verifier.store is not None:
        verifier.store.private = state.path.with_suffix(".pushed")
    updates.fill(catalog.entries)
    verifier.save()
    if verifier.store is not None:
        # Now that what an earlier run pushed or keeps for a rollback counts as used.
        verifier.store.remove_unused()
    if updates.residency.places is not None:
        updates.residency.places.images.remove_unused()
    return ServerContext(
        folding,
        updates,
        server_keys(args, admin=config.admin_api_key, file=config.keys),
        watch=FolderWatch(root, updates, updates.say) if root is not None else None,
        follow=config.watch,
        strict=config.strict,
        fold_at_start=config.fold,
        metrics=metrics,
    )


def _state_path(config: ServeConfig, args: Any, root: Path | None) -> Path:
    if config.state:
        return Path(os.path.expanduser(config.state))
    # Servers that share a folder listen on different ports, and each keeps its own decisions.
    where = f"{root and root.resolve()}|{args.uds or args.port}"
    name = hashlib.sha256(where.encode()).hexdigest()[:32]
    return cache_root() / "serve" / "state" / f"{name}.json"


def _check_settings(config: ServeConfig, vllm_flags: list[str]) -> None:
    """Refuse what a start would refuse. vLLM is imported only where there are flags for it."""
    args: Any = SimpleNamespace(api_key=None)
    if vllm_flags:
        args = check_vllm_flags(vllm_flags)
    keys = server_keys(args, admin=config.admin_api_key, file=config.keys)
    if config.ui:
        page_access(config.ui_host, login=config.ui_auth, no_login=config.ui_no_auth, keys=keys)


def _default_name(base: ResolvedBase) -> str:
    """Return a folder's last part, and what was typed for an alias or a hub id."""
    return base.path.name if base.model_id == str(base.path) else base.name


def _verifier(config: ServeConfig, base: ResolvedBase) -> Verifier:
    """Return what checks the adapters; with ``--check`` it writes nothing."""

    # A checkpoint of its own each time: what was compared stays mapped as long as it is open.
    def checkpoint() -> Checkpoint:
        return Checkpoint(base.path)

    if config.check or not config.adapters:
        return Verifier(checkpoint)
    serve = cache_root() / "serve"
    verified = Verified(serve / "verified", base.path)
    store = SnapshotStore(serve / "adapters", verified)
    images = DeltaImages(serve / "deltas", base.path, config.resident_dtype)
    return Verifier(checkpoint, store, verified, images)


def _catalog(
    config: ServeConfig, base: ResolvedBase, names: list[str], verifier: Verifier
) -> Catalog:
    """Check all adapters, print them, and refuse what the settings ask of them."""
    catalog = Catalog(())
    if config.adapters:
        catalog = scan(config.adapters, Checkpoint(base.path), taken=names, verifier=verifier)
    if catalog.entries:
        say(f"{catalog.table()}\n\n{summary(catalog, config.base)}", prefix="")
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


def _start_importing(vllm_flags: list[str]) -> bool:
    """Have another process import vLLM while this one checks the adapters; return whether it does.

    Before anything here has threads; see :mod:`secura_serve.serve.fork_server`.
    """
    # Here, since torch takes a folder below /tmp when it is imported; a container loses that one.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
    forked = fork_server.can_fork(vllm_flags) and fork_server.start()
    # vLLM's own command line sets it too: its workers must not be forked from a used process.
    os.environ.setdefault(fork_server.METHOD, "spawn")
    return forked


def _prepare_vllm(forked: bool) -> None:
    """Check this vLLM, and choose the plugins that it loads: our routes are one."""
    from secura_serve.serve import compat, plugin

    compat.check()
    if forked:
        fork_server.use()
    plugin.choose_plugins()


def _takes_adapters(
    checkpoint: Checkpoint, served: list[Adapter | PlainLoRA], vllm_flags: list[str]
) -> bool:
    """Switch adapters per request on; return whether this vLLM has them for this base."""
    from secura_serve.serve import compat, plugin

    refuse_hiding_settings(vllm_flags)
    architectures = checkpoint.config.get("architectures") or []
    if not compat.supports_adapters(architectures):
        if served:
            say(
                f"\nvLLM {compat.vllm_version()} offers no per-request adapters for "
                f"{', '.join(architectures)}: each of these answers only while it is folded "
                "(--fold NAME, or POST /admin/fold), plain LoRAs not at all",
                prefix="",
            )
        return False
    plugin.activate()
    return True
