"""``secura-serve``: one base, a folder of adapters, vLLM's own server in this process.

``main`` walks through the rooms in order: base -> checkpoint -> catalog -> shared basis -> vLLM's
arguments -> chat page -> vLLM. Everything up to the basis works without vLLM (``--check``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secura_serve import __version__
from secura_serve.adapter import Adapter
from secura_serve.bases import ALIASES, ResolvedBase, cache_root, resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import BaseModelError, ConfigError, SecuraError
from secura_serve.serve import chat_page
from secura_serve.serve.basis import SharedBasis
from secura_serve.serve.catalog import Catalog, scan
from secura_serve.serve.memory import Memory, estimate, kv_cache_gib

__all__ = ["main"]

_DESCRIPTION = """\
Serve one base model with any number of SECURA adapters, each chosen per request by the
`model` field of an OpenAI request, through vLLM."""

_EPILOG = f"""\
Any other flag goes to vLLM (`--port 9000`, `--max-model-len 4096`, `--dtype float32`,
`--api-key KEY`, `--enable-auto-tool-choice` ...); `secura-serve --help=all` lists them.

examples:
  secura-serve --base smollm2-135m --adapters ./adapters
  secura-serve --base llama3-8b --adapters ./adapters --port 9000 --no-ui
  secura-serve --base ./my-model --adapters ./adapters --check

base aliases: {", ".join(ALIASES)}"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="secura-serve",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", default="smollm2-135m", help="alias, hub id or local folder (%(default)s)")
    add("--adapters", metavar="DIR", help="folder of adapter folders; none: only the base")
    add("--strict", action="store_true", help="refuse to start if any adapter is not servable")
    add("--check", action="store_true", help="check the adapters against the base and exit")
    add("--no-ui", action="store_true", help="no chat page")
    add("--ui-host", default=None, help="address of the chat page (default: that of the server)")
    add("--ui-port", type=int, default=7860, help="port of the chat page (%(default)s)")
    add("--version", action="version", version=f"secura-serve {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``secura-serve``. Returns the exit status; errors go to stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(a.startswith("--help=") for a in arguments):
            return _vllm_help(arguments)
        known, rest = _parser().parse_known_args(arguments)
        return _run(known, rest)
    except SecuraError as error:
        print(f"secura-serve: {error}", file=sys.stderr)
        return 1


def _vllm_help(arguments: list[str]) -> int:
    from secura_serve.serve import compat

    parser, _ = compat.make_arg_parser()
    parser.parse_args([a for a in arguments if a.startswith("--help=")])
    return 0


def _run(known: argparse.Namespace, rest: list[str]) -> int:
    base = resolve_base(known.base)
    checkpoint = Checkpoint(base.path)
    names = _served_names(base, known.base, rest)
    catalog = scan(known.adapters, checkpoint, taken=names) if known.adapters else Catalog(())
    print(catalog.table() if catalog.entries else _nothing(known.adapters), flush=True)
    if known.check:
        print(f"\n{len(catalog.served)} servable on {known.base}, {len(catalog.refused)} not")
        return 1 if catalog.refused else 0
    if known.strict and catalog.refused:
        raise ConfigError(
            f"--strict: {len(catalog.refused)} of {len(catalog.entries)} adapters cannot be "
            f"served: {', '.join(e.name for e in catalog.refused)}"
        )

    from secura_serve.serve import compat, plugin

    compat.check()
    if catalog.served:
        _refuse_what_would_hide_adapters(rest)
        if not compat.supports_adapters(checkpoint.config.get("architectures") or []):
            raise BaseModelError(
                f"{known.base}: vLLM {compat.vllm_version()} offers no per-request adapters for "
                f"{', '.join(checkpoint.config['architectures'])}. Merge one adapter into the "
                "base and serve the result, or serve the base without --adapters"
            )
        plugin.activate()
    parser, validate = compat.make_arg_parser()
    basis = SharedBasis.of(catalog.served)
    args = parser.parse_args(_vllm_arguments(base, names, catalog.served, basis, rest))
    validate(args)
    memory = estimate(checkpoint, basis, slots=args.max_loras, dtype=args.dtype)
    _set_environment(memory)
    return _serve(known, args, memory)


def _nothing(folder: str | None) -> str:
    where = f"{folder} holds no adapter" if folder else "no --adapters"
    return f"{where}: serving the base alone"


def _served_names(base: ResolvedBase, asked: str, rest: list[str]) -> list[str]:
    """The names under which the base answers: the user's, or the name of --base."""
    if "--served-model-name" in rest:
        start = rest.index("--served-model-name") + 1
        stop = next((i for i in range(start, len(rest)) if rest[i].startswith("-")), len(rest))
        return rest[start:stop]
    for flag in rest:
        if flag.startswith("--served-model-name="):
            return [flag.partition("=")[2]]
    return [base.path.name if base.model_id == str(base.path) else asked]


def _refuse_what_would_hide_adapters(rest: Sequence[str]) -> None:
    """Settings under which vLLM would answer an adapter's request with the base alone."""
    problems = []
    if "--fully-sharded-loras" in rest:
        problems.append("--fully-sharded-loras: an adapter's U is not worth sharding; leave it out")
    for name in ("VLLM_LORA_ENABLE_DUAL_STREAM", "VLLM_SKIP_MODEL_NAME_VALIDATION"):
        if os.environ.get(name, "0").lower() in ("1", "true"):
            problems.append(f"{name} is set; unset it")
    if problems:
        raise ConfigError("not allowed, adapters would silently not be applied:", problems)


def _vllm_arguments(
    base: ResolvedBase,
    names: list[str],
    served: list[Adapter],
    basis: SharedBasis,
    rest: list[str],
) -> list[str]:
    """vLLM's command line: ours first, so that the user's flags win."""
    ours = ["--model", str(base.path), "--host", "127.0.0.1"]
    if not any(flag.startswith("--served-model-name") for flag in rest):
        ours += ["--served-model-name", *names]
    if not served:
        return [*ours, *rest]
    targets = sorted({module.rpartition(".")[2] for a in served for module in a.modules})
    slots = min(max(len(served), 8), 256)
    extra = {"secura": {"basis": str(basis.save(cache_root() / "serve")), "base": str(base.path)}}
    ours += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", "8"]
    ours += ["--max-cpu-loras", str(max(len(served), slots)), "--lora-target-modules", *targets]
    ours += ["--additional-config", json.dumps(extra), "--lora-modules"]
    ours += [
        json.dumps({"name": a.name, "path": str(a.path), "base_model_name": names[0]})
        for a in served
    ]
    return [*ours, *rest]


def _set_environment(memory: Memory) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib(memory)))


def _serve(known: argparse.Namespace, args: Any, memory: Memory) -> int:
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    scheme = "https" if args.ssl_certfile else "http"
    reachable = "127.0.0.1" if args.host in ("0.0.0.0", "::", None) else args.host
    endpoint = f"{scheme}://{reachable}:{args.port}"
    print(f"\nmemory: {memory}\nstarting; the endpoint will be {endpoint}/v1", flush=True)
    examples = Path(known.adapters) / "examples.json" if known.adapters else None
    page = chat_page.ChatPage(
        endpoint,
        host=known.ui_host or args.host or "127.0.0.1",
        port=known.ui_port,
        api_key=args.api_key[0] if args.api_key else None,
        examples=examples if examples and examples.is_file() else None,
        enabled=not known.no_ui,
    )
    with page:
        uvloop.run(run_server(args))
    return 0
