"""``secura-serve``: our flags -> settings, all others to vLLM -> one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from secura_serve.bases import ALIASES, cache_root
from secura_serve.command import CommandParser, run_command
from secura_serve.config import add_flags, build
from secura_serve.serve import logs
from secura_serve.serve.app.config import FROM_ENVIRONMENT, ServeConfig
from secura_serve.serve.app.lifecycle.start_signals import hide_leak_warnings

__all__ = ["main", "parser", "read_flags"]

_DESCRIPTION = """\
Serve one base model with any number of SECURA adapters, each chosen per request by the
`model` field of an OpenAI request, through vLLM."""

_EPILOG = f"""\
Any other flag goes to vLLM (`--port 9000`, `--max-model-len 4096`, `--dtype float32`,
`--api-key KEY`, `--enforce-eager` ...); `secura-serve --help=all` lists them.

examples:
  secura-serve --base smollm2-135m --adapters ./adapters
  secura-serve --base llama3-8b --adapters ./adapters --port 9000 --no-ui
  secura-serve --base ./my-model --adapters ./adapters --check
  secura-serve --base llama3-8b --adapters ./adapters --fold my-bounded-adapter

base aliases: {", ".join(ALIASES)}"""


def parser() -> CommandParser:
    """Return the parser of our own flags."""
    made = CommandParser("secura-serve", description=_DESCRIPTION, epilog=_EPILOG)
    # Names with blanks between them, as vLLM takes them.
    names = {"served_model_name": "+"}
    add_flags(made, ServeConfig, nargs=names)
    return made


def read_flags(argv: Sequence[str]) -> tuple[ServeConfig, list[str]]:
    """Return our settings, and the flags that are for vLLM.

    Raises:
        ConfigError: a value of ours that is not allowed.
    """
    known, rest = parser().parse_known_args(argv)
    given = vars(known)
    for name, variable in FROM_ENVIRONMENT.items():
        if variable in os.environ:
            given.setdefault(name, os.environ[variable])
    return build(ServeConfig, given), rest


def _run(argv: list[str]) -> int:
    if any(flag.startswith("--help=") for flag in argv):
        from secura_serve.serve.app.vllm_flags import print_help

        print_help(argv)
    hide_leak_warnings()
    config, rest = read_flags(argv)
    if config.log_format == "json":
        logs.write_json(cache_root() / "serve")
    from secura_serve.serve.app.start import start

    return start(config, rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    return run_command("secura-serve", _run, argv, settings=ServeConfig, report=_report)


def _report(text: str) -> None:
    logs.say(text, prefix="", level=logging.ERROR, to_stderr=True)
