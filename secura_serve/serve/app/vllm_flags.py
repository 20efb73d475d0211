"""The flags of ``vllm serve``: what the user did not give is taken from what is to be served."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from secura_serve.adapter import Adapter
from secura_serve.addresses import port_problem
from secura_serve.command import suggest_flags
from secura_serve.errors import ConfigError
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.resident.slots import ResidentSpec
from secura_serve.serve.app.config import ServeConfig
from secura_serve.serve.app.http.access import Keys, check_key
from secura_serve.serve.app.http.key_file import KeyFile
from secura_serve.serve.app.memory import Memory, default_cached, default_slots
from secura_serve.serve.basis import SharedBasis
from secura_serve.serve.kernels import choose_kernel
from secura_serve.serve.logs import LOGGING_FILE, is_json
from secura_serve.serve.names import CONFIG_KEY, LOAD_FORMAT

__all__ = [
    "check_vllm_flags",
    "parse_vllm_flags",
    "print_help",
    "refuse_hiding_settings",
    "server_keys",
]

# vLLM's allowed values of --max-lora-rank; it sizes stock LoRA's buffers, which are made only where
# plain LoRA is served.
_STOCK_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_GUARD = "secura_serve.serve.app.http.guard.GuardMiddleware"
_DRAIN_S = 20
_EXTENSION = "secura_serve.serve.engine.worker_extension.WorkerExtension"


def print_help(argv: Sequence[str]) -> None:
    """Print vLLM's own help for ``--help=all``, ``--help=max-model-len`` and the like; exits."""
    from secura_serve.serve import compat

    parser, _ = compat.make_arg_parser()
    parser.parse_args([flag for flag in argv if flag.startswith("--help=")])


def refuse_hiding_settings(rest: Sequence[str]) -> None:
    """Raise ConfigError for settings under which vLLM would answer an adapter's request with
    the base alone, or would not know our adapters."""
    flags = {flag.partition("=")[0].replace("_", "-") for flag in rest}
    problems = []
    if "--fully-sharded-loras" in flags:
        problems.append("--fully-sharded-loras: an adapter's U is not worth sharding; leave it out")
    if "--enable-dbo" in flags:
        problems.append(
            "--enable-dbo: the second half of a batch would get the adapters of the first; leave "
            "it out"
        )
    if "--enable-sleep-mode" in flags:
        problems.append(
            "--enable-sleep-mode: what adapters keep on the device is lost in a sleep of level 2; "
            "leave it out"
        )
    if "--lora-modules" in flags:
        problems.append("--lora-modules: put the adapter's folder into --adapters instead")
    for name in ("VLLM_LORA_ENABLE_DUAL_STREAM", "VLLM_SKIP_MODEL_NAME_VALIDATION"):
        if os.environ.get(name, "0").strip().lower() not in ("", "0", "false"):
            problems.append(f"{name} is set in the environment; unset it")
    for name in ("VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST"):
        if os.environ.get(name):
            problems.append(f"{name} has adapters loaded unchecked; unset it, and use --adapters")
    if problems:
        raise ConfigError(
            "not allowed, adapters would silently not be applied, or not as they were checked:",
            problems,
        )


def check_vllm_flags(rest: Sequence[str]) -> Any:
    """Return vLLM's flags as it parses them; raise ConfigError for those that a start refuses.

    Imports vLLM, which alone knows its flags.
    """
    try:
        from secura_serve.serve import compat

        parser, _ = compat.make_arg_parser()
    except ImportError as error:
        hint = suggest_flags(f"unrecognized {' '.join(rest)}", _our_flags())
        raise ConfigError(
            f"unrecognized arguments: {' '.join(rest)}{hint} (secura-serve --help lists our "
            f"flags; vLLM, which has others, cannot be imported: {error})"
        ) from error
    return _parse(parser, rest)


def _parse(parser: Any, rest: Sequence[str]) -> Any:
    """Parse vLLM's flags, with short errors, and refuse values that depend on nothing else."""
    if sum(flag.partition("=")[0] in ("--api-key", "--api_key") for flag in rest) > 1:
        raise ConfigError("--api-key is given twice; give all keys after one: --api-key K1 K2")
    _brief_errors(parser)
    args = parser.parse_args(list(rest))
    if args.max_loras is not None and args.max_loras < 1:
        raise ConfigError(
            f"--max-loras {args.max_loras}: adapters need at least 1 slot; leave it out, and their "
            "number is chosen by what they take"
        )
    if problem := port_problem(args.port):
        raise ConfigError(f"--port: {problem}")
    return args


def _our_flags() -> set[str]:
    return {f"--{item.name.replace('_', '-')}" for item in fields(ServeConfig)}


def _brief_errors(parser: Any) -> None:
    """Have vLLM's parser raise where it would print hundreds of lines of usage and exit."""
    known = {flag for flag in parser._option_string_actions if flag.startswith("--")}

    def refuse(message: str) -> NoReturn:
        hint = suggest_flags(message, known | _our_flags())
        raise ConfigError(
            f"{message}{hint} (secura-serve --help lists our flags, --help=all vLLM's)"
        )

    parser.error = refuse


def parse_vllm_flags(
    rest: Sequence[str],
    *,
    path: Path,
    names: Sequence[str],
    served: Sequence[Adapter | PlainLoRA],
    per_request: bool,
    foldable: bool,
    basis: SharedBasis,
    resident: ResidentSpec,
    memory: Callable[..., Memory],
    cache: Path,
) -> Any:
    """Parse vLLM's flags; what the user did not give is taken from what is to be served.

    Args:
        rest: the flags that are not ours; they win over our defaults.
        path: the base's folder.
        names: what the base is called in requests.
        served: the adapters that the folder has now.
        per_request: whether adapters are served per request, from the start or later.
        foldable: there are, or may come, adapters to fold, so the workers must know how.
        basis: their union, handed to the workers as a file under ``cache``.
        resident: the places for full-rank adapters.
        memory: what a number of ``slots`` of a ``dtype`` takes.

    Returns:
        vLLM's ``serve`` namespace, validated by vLLM.

    Raises:
        ConfigError: a flag that contradicts ours, or a kernel that does not run here.
    """
    from secura_serve.serve import compat

    parser, validate = compat.make_arg_parser()
    parser.set_defaults(host="127.0.0.1", served_model_name=list(names), model=str(path))
    # vLLM's own default, 0, would cut every running request.
    parser.set_defaults(shutdown_timeout=_DRAIN_S)
    arguments = list(rest)
    if foldable:
        parser.set_defaults(worker_extension_cls=_EXTENSION)
    if per_request:
        changed = {module for a in served for module in a.modules} | set(basis.modules)
        changed |= set(resident.modules)
        targets = sorted({module.rpartition(".")[2] for module in changed})
        widest = max((a.r for a in served if isinstance(a, PlainLoRA)), default=0)
        parser.set_defaults(
            enable_lora=True,
            max_loras=None,
            max_lora_rank=next((r for r in _STOCK_RANKS if r >= widest), _STOCK_RANKS[-1]),
            lora_target_modules=targets,
        )
    args = _parse(parser, arguments)
    if is_json():
        _log_as_json(args)
    if args.model_tag is not None or args.model != str(path):
        raise ConfigError(
            f"{args.model_tag or args.model!r}: the base model is named by --base, not otherwise"
        )
    if foldable and args.worker_extension_cls != _EXTENSION:
        raise ConfigError(
            f"--worker-extension-cls {args.worker_extension_cls}: adapters need this place for "
            "folding; leave it out"
        )
    if foldable and args.load_format == LOAD_FORMAT:
        raise ConfigError(f"--load-format {LOAD_FORMAT}: use --fold NAME beside --adapters")
    if (foldable or per_request) and args.pipeline_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size}: adapters were not run on "
            "pipeline stages (on CPUs vLLM 0.32 fails there without any); use "
            "--tensor-parallel-size or --data-parallel-size"
        )
    if foldable and (args.api_server_count or 1) > 1:
        raise ConfigError(
            f"--api-server-count {args.api_server_count}: which adapters there are, and which is "
            "folded, is known to one server process; leave it out"
        )
    if per_request:
        slot, many = memory(dtype=args.dtype).slot, len(served) + resident.count
        if args.max_loras is None:
            args.max_loras = default_slots(many, slot)
        if args.max_cpu_loras is None:
            args.max_cpu_loras = max(args.max_loras, default_cached(many, slot))
        plain = any(isinstance(a, PlainLoRA) for a in served)
        ours: dict[str, Any] = {"basis": str(basis.save(cache)), "base": str(path)}
        ours |= {"plain_lora": plain, "resident": resident.to_json() if resident.count else None}
        # Only for vLLM's key of compiled code, which holds this: another kernel is other code.
        ours["kernel"] = _kernel(args.dtype)
        args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: ours}
    args.middleware = [*args.middleware, _GUARD]
    validate(args)
    return args


def _kernel(dtype: str) -> str:
    """Return the name of the kernel that the workers will choose.

    Raises:
        ConfigError: ``SECURA_KERNEL`` names one that does not run here.
    """
    from vllm.plugins import load_general_plugins

    from secura_serve.serve import compat

    # A package of the user's own registers its kernel there.
    load_general_plugins()
    named = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
    return choose_kernel(torch.device(compat.device_type()), named).name


def _log_as_json(args: Any) -> None:
    """Have vLLM log as :func:`~secura_serve.serve.logs.write_json` has decided.

    Raises:
        ConfigError: a flag that vLLM would then not follow.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("log_config_file", "logging_config", "log_level")
        if getattr(args, name, None) not in (None, os.environ[LOGGING_FILE])
    ]
    if args.disable_access_log_for_endpoints:
        given.append("--disable-access-log-for-endpoints")
    if given:
        raise ConfigError(
            f"{', '.join(given)}: --log-format json configures vLLM's logging itself; leave one of "
            "them out (the level is $VLLM_LOGGING_LEVEL; --disable-uvicorn-access-log drops the "
            "lines about requests)"
        )
    from secura_serve.serve.compat import log_by_file

    log_by_file(args, os.environ[LOGGING_FILE])


def server_keys(args: Any, *, admin: str | None, file: str | None = None) -> Keys:
    """Return the keys that the server asks for.

    Args:
        args: vLLM's ``serve`` namespace.
        admin: the key of the admin routes.
        file: the file of ``--keys``.

    Raises:
        ConfigError: a key is empty, which vLLM takes for none, and answers everyone; the admin
            key is a user's as well; or the file cannot be used.
    """
    check_key(admin, "--admin-api-key (or SECURA_ADMIN_API_KEY)")
    keys = Keys(_user_keys(args), admin)
    if admin is not None and admin in keys.user:
        raise ConfigError(
            "the key of --admin-api-key is one of --api-key as well, so every user could change "
            "the server; give another one"
        )
    if file is None:
        return keys
    if os.environ.get("VLLM_ENABLE_RESPONSES_API_STORE", "0").strip() not in ("", "0"):
        raise ConfigError(
            "VLLM_ENABLE_RESPONSES_API_STORE is set in the environment: vLLM does not keep stored "
            "responses apart by key, so every key of --keys could read and cancel those of the "
            "others; unset it"
        )
    key_file = KeyFile(Path(os.path.expanduser(file)), keys.plain)
    return Keys(keys.user, admin, key_file, internal=secrets.token_urlsafe(32))


def _user_keys(args: Any) -> tuple[str, ...]:
    if args.api_key is not None:
        if not args.api_key:
            raise ConfigError("--api-key names no key; give one, or leave the flag out")
        # vLLM reads an empty word as None.
        given = [key or "" for key in args.api_key]
        return tuple(check_key(key, "--api-key") or "" for key in given)
    key = check_key(os.environ.get("VLLM_API_KEY"), "VLLM_API_KEY (in the environment)")
    return (key,) if key else ()
