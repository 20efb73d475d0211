"""vLLM's server in this process, with the chat page beside it, until it is stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
from vllm.platforms import current_platform

from secura_serve.errors import ConfigError, FoldError, ServeError
from secura_serve.serve.app.chat_page import ChatPage
from secura_serve.serve.app.config import ServeConfig
from secura_serve.serve.app.http.access import PageAccess, page_access
from secura_serve.serve.app.http.context import ServerContext
from secura_serve.serve.app.lifecycle.draining import MIDDLEWARE, Shutdown
from secura_serve.serve.app.lifecycle.engine_health import EngineHealth
from secura_serve.serve.app.lifecycle.start_signals import stop_cleanly_during_start
from secura_serve.serve.app.lifecycle.write_deadline import http_protocol
from secura_serve.serve.app.memory import Memory, kv_cache_gib
from secura_serve.serve.app.startup_messages import ready_notice, who_can_reach
from secura_serve.serve.logs import say
from secura_serve.system.garbage_collection import collect_as_usual
from secura_serve.system.os_errors import reason

__all__ = ["run"]

# Seconds that a client has to take what is left of its answer once the server has ended; without a
# limit one that does not read would hold it.
_LAST_BYTES = 5
_ENGINE_STOP_S = 15


def run(config: ServeConfig, args: Any, memory: Memory, context: ServerContext) -> None:
    """Listen, start the engine, and answer until a signal comes.

    Args:
        args: vLLM's ``serve`` namespace.
        memory: what serving is expected to take.

    Raises:
        ConfigError: vLLM does not accept the settings.
        ServeError: an address is taken, or the engine did not start or has died.
        FoldError: a fold failed and the base could not be put back.
    """
    collect_as_usual()
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib(memory)))
        # vllm 0.32 cannot load what it saves with it on a CPU ("'function' object has no attribute
        # 'finalize_loading'"), so every start would compile anew; Inductor's own cache does work.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    scheme = "https" if args.ssl_certfile else "http"
    reachable = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host
    endpoint = f"{scheme}://{reachable}:{args.port}"
    access = None
    if config.ui:
        if config.ui_port == args.port and not args.uds:
            raise ConfigError(
                f"--ui-port {config.ui_port} is the port of the endpoint, too; choose another one, "
                "or leave the page out with --no-ui"
            )
        access = page_access(
            config.ui_host, login=config.ui_auth, no_login=config.ui_no_auth, keys=context.keys
        )
    page = _chat_page(config, endpoint, access, context)
    page.check_port()
    try:
        address, socket = setup_server(args, reuse_port=False)
    except (OSError, OverflowError) as error:
        raise ServeError(
            f"cannot listen on {args.host}:{args.port} ({reason(error)}); choose another --port"
        ) from error
    say(f"\n{who_can_reach(args, context.keys, access, config.ui_port)}", prefix="")
    say(f"\nmemory: {memory}\nstarting; the endpoint will be {endpoint}/v1", prefix="")
    stop_cleanly_during_start()
    args.middleware = [*args.middleware, MIDDLEWARE]
    with page, EngineHealth() as health:
        admission = context.folding.admission
        context.shutdown = Shutdown(
            args.shutdown_timeout, health, lambda: admission.running, context.updates.stop
        )
        context.ready_notice = ready_notice(
            args, context.keys, access, endpoint=endpoint, page_port=config.ui_port
        )
        context.hand_over(args)
        # The engine process needs a moment to remove what it shares with its workers.
        args.shutdown_timeout = max(args.shutdown_timeout, _ENGINE_STOP_S)
        try:
            uvloop.run(
                run_server_worker(
                    address,
                    socket,
                    args,
                    timeout_graceful_shutdown=_LAST_BYTES,
                    http=http_protocol(config.write_timeout),
                )
            )
        except ValueError as error:
            raise ConfigError(f"vLLM does not accept these settings: {error}") from error
        except RuntimeError as error:
            if (cause := health.reported()) is None:
                raise
            raise ServeError(f"the engine did not start: {cause}") from error
    if context.shutdown.engine_died is not None:
        raise ServeError(f"the engine died: {context.shutdown.engine_died}")
    if context.answers.broken is not None:
        raise FoldError(context.answers.broken)


def _chat_page(
    config: ServeConfig, endpoint: str, access: PageAccess | None, context: ServerContext
) -> ChatPage:
    def beside_adapters(name: str) -> Path | None:
        file = Path(config.adapters or "") / name
        return file if config.adapters and file.is_file() else None

    return ChatPage(
        endpoint,
        access=access or PageAccess(),
        port=config.ui_port,
        api_key=next(iter(context.keys.user), context.keys.internal),
        examples=beside_adapters("examples.json"),
        results=beside_adapters("experiment.json"),
        enabled=access is not None,
    )
