"""What the start tells its user beside the table of adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from secura_serve.adapter import Adapter
from secura_serve.merge import open_source
from secura_serve.serve.app.adapters.content.catalog import Catalog
from secura_serve.serve.app.adapters.content.fine_tune import FineTune
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.resident.slots import ResidentSpec
from secura_serve.serve.app.http.access import Keys, PageAccess, is_loopback
from secura_serve.serve.app.memory import Memory
from secura_serve.serve.basis import SharedBasis
from secura_serve.serve.logs import say

__all__ = [
    "announce_fold",
    "no_adapters",
    "ready_notice",
    "warn_of_fewer_slots",
    "warn_of_width",
    "who_can_reach",
    "summary",
    "tell_of_places",
]


def warn_of_width(basis: SharedBasis, adapters: list[Adapter]) -> None:
    """Name the adapters that widen the basis for all."""
    if outside := basis.off_basis(adapters):
        more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        verb = "does" if len(outside) == 1 else "do"
        say(
            f"\nwarning: {', '.join(outside[:5])}{more} {verb} not share the basis of the others, "
            f"so that every token of every adapter pays for up to {basis.width} rows and columns a "
            f"linear instead of {max(a.r for a in adapters)}. Trained with the --selection and "
            "--selection-seed of the others they would cost nothing extra",
            prefix="",
            level=logging.WARNING,
        )


def warn_of_fewer_slots(
    memory: Memory, served: list[Adapter | PlainLoRA], loras: list[PlainLoRA]
) -> None:
    """Say that there are fewer slots than adapters, and what makes them large."""
    slots = memory.slots - 1
    if slots >= len(served):
        return
    widest = max(loras, key=lambda lora: lora.r, default=None)
    say(
        f"\n{len(served)} adapters take turns in {slots} slots of {memory.slot / 2**20:.2f} MiB "
        "(--max-loras): a request for one that is in none waits until it is"
        + (f". The LoRA {widest.name}, of rank {widest.r}, makes all as large" if widest else ""),
        prefix="",
    )


def tell_of_places(resident: ResidentSpec, full_rank: Sequence[Adapter | FineTune]) -> None:
    """Say how full-rank adapters are asked, where that is not simply one place for each."""
    if len(full_rank) <= resident.count:
        return
    names = ", ".join(adapter.name for adapter in full_rank[:5])
    more = f" and {len(full_rank) - 5} more" if len(full_rank) > 5 else ""
    if not resident.count:
        how = (
            "are asked only while folded into the weights (--fold, or POST /admin/fold), "
            "fine-tunes not at all"
        )
    else:
        how = (
            f"take turns in {resident.count} place{'' if resident.count == 1 else 's'}: a "
            "request for one that is in none waits until it is"
        )
    say(f"\n{names}{more} are full-rank, and {how}; --resident makes more places", prefix="")


def announce_fold(base: str, args: Any) -> None:
    """Find out now, not in the engine, what ``--load-format secura`` cannot fold."""
    from secura_serve.serve.loader import named_adapters

    specs = named_adapters(args.model_loader_extra_config or {})
    open_source(base, specs)
    say(
        f"folding {' + '.join(specs)} into the weights while loading; the result answers as "
        f"{args.served_model_name[0]} (--served-model-name gives it another name)",
        prefix="",
    )


def summary(catalog: Catalog, base: str) -> str:
    """Return how many adapters can be served, and how."""
    full_rank = len(catalog.full_rank)
    return (
        f"{len(catalog.served) + len(catalog.plain_loras) + full_rank} servable on {base}"
        + (f", {full_rank} of them full-rank" if full_rank else "")
        + f", {len(catalog.refused)} not"
    )


def no_adapters(folder: str | None) -> str:
    """Return that there is no adapter, and why."""
    where = f"{folder} holds no adapter" if folder else "no --adapters"
    return f"{where}: serving the base alone"


def who_can_reach(args: Any, keys: Keys, page: PageAccess | None, page_port: int) -> str:
    """Return as text who may ask for what, with a warning for each door that is open to strangers.

    Args:
        args: vLLM's ``serve`` namespace.
        page: the chat page; None if there is none.
    """
    from secura_serve.serve.app.http.routes import ROUTES

    unguarded = [route.path.partition("{")[0] for route in ROUTES if route.access == "anyone"]
    lines = [
        "who can reach what:",
        f"  generating (/v1/...)   {_endpoint(args)}, {_user_key(keys)}",
        f"  changing adapters      {_admin_key(keys)}",
        f"  always without a key   {', '.join(unguarded)} (those that this vLLM has)",
    ]
    if page is not None:
        lines.append(f"  chat page              {_place(page.host, page_port)}, {_login(page)}")
    return "\n".join([*lines, *_warnings(args, keys, page)])


def ready_notice(
    args: Any, keys: Keys, page: PageAccess | None, *, endpoint: str, page_port: int
) -> str:
    """Return what stands below vLLM's log once the server answers: :func:`who_can_reach` in short,
    with the same warnings.

    Args:
        endpoint: ``http://host:port`` of the server.
    """
    reach = _endpoint(args) if args.uds else f"{endpoint}/v1 {_reach(args.host)}"
    lines = [
        "secura-serve is ready",
        f"  OpenAI endpoint  {reach}, {_user_key(keys)}",
        f"  admin routes     {_admin_key(keys)}",
    ]
    if page is not None:
        lines.append(f"  chat page        {_place(page.host, page_port)}, {_login(page)}")
    return "\n".join([*lines, *_warnings(args, keys, page)])


def _warnings(args: Any, keys: Keys, page: PageAccess | None) -> list[str]:
    """Return a warning for each door that is open to strangers."""
    lines = []
    if not (args.uds or _here(args.host) or keys.needed):
        lines.append(
            f"\nwarning: whoever reaches {args.host or 'this machine'} can ask this server; give "
            "--api-key KEY, or leave --host out"
        )
    if not (page is None or _here(page.host) or page.login):
        lines.append(
            f"\nwarning: whoever reaches {page.host or 'this machine'} can use the chat page; give "
            "--ui-auth USER:PASSWORD, or leave --ui-host out"
        )
    return lines


def _user_key(keys: Keys) -> str:
    flags = [*(["--api-key"] if keys.user else []), *(["--keys"] if keys.file else [])]
    return f"with a key of {' or '.join(flags)}" if flags else "without a key"


def _admin_key(keys: Keys) -> str:
    admin = ["the key of --admin-api-key"] if keys.admin else []
    if keys.file and any(key.role == "admin" for key in keys.file.keys):
        admin.append("an admin key of --keys")
    if admin:
        return f"with {' or '.join(admin)}"
    if keys.file:
        return 'nobody: --keys has no key with role = "admin"'
    return "direct requests on this machine only, without a key"


def _login(page: PageAccess) -> str:
    return "with the login of --ui-auth" if page.login else "without a login"


def _endpoint(args: Any) -> str:
    return f"unix:{args.uds}" if args.uds else _place(args.host, args.port)


def _here(host: str | None) -> bool:
    return host == "localhost" or is_loopback(host or "")


def _place(host: str | None, port: int) -> str:
    shown = f"[{host}]" if host and ":" in host else host or "every address"
    return f"{shown}:{port} {_reach(host)}"


def _reach(host: str | None) -> str:
    return "(this machine only)" if _here(host) else "(also other machines)"
