"""The chat page: base, adapters and mixes of a server side by side, and what the server has.

A process of its own, which knows an endpoint's address and no more:

    secura-demo --endpoint http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from secura_serve.addresses import port_problem
from secura_serve.command import CommandParser, run_command
from secura_serve.errors import ConfigError, ServeError

from .endpoint import add_arguments, connect, without_login
from .examples import Examples, read_examples
from .guard import Guard, is_local
from .retention.results import Results, read_results

LARGEST_UPLOAD = "512mb"
TRIES = 4
SESSIONS = 1000


_DESCRIPTION = """\
Open the chat page: base, adapters and mixes of a server side by side, and what
the server has."""

_EXAMPLES = """examples:
  secura-demo
  secura-demo --endpoint http://127.0.0.1:9000/v1 --port 7861
  secura-demo --examples adapters/examples.json --results adapters/experiment.json"""


def parser() -> CommandParser:
    """Return the command line of ``secura-demo``."""
    made = CommandParser("secura-demo", description=_DESCRIPTION, epilog=_EXAMPLES)
    add_arguments(made)
    made.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    made.add_argument("--port", type=_port, default=7860, help="of the page (default: %(default)s)")
    made.add_argument("--examples", metavar="FILE", help='JSON: {adapter: [{"prompt": "..."}]}')
    made.add_argument(
        "--results",
        metavar="FILE",
        action="append",
        default=[],
        help="summary.json of an experiment, or continual.json of a run, for the retention tab; "
        "may be given again",
    )
    made.add_argument(
        "--share",
        choices=["never", "public"],
        default="never",
        help="public: a gradio.live link, which whoever has it may open (default: %(default)s)",
    )
    made.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        default=os.environ.get("SECURA_UI_AUTH"),
        help="login of the page (default: $SECURA_UI_AUTH)",
    )
    made.add_argument(
        "--no-auth",
        action="store_true",
        help="let whoever reaches the page use the endpoint, under any name; beyond this machine "
        "not with a key",
    )
    made.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when standard input does: whoever started this page is then gone",
    )
    return made


def login(args: argparse.Namespace) -> tuple[str, str] | None:
    """Return user and password of the page. Raises ValueError if it needs them and has none."""
    if args.auth is not None:
        user, _, password = args.auth.partition(":")
        if not (user and password):
            raise ValueError("--auth should be USER:PASSWORD, neither of them empty")
        if args.no_auth:
            raise ValueError("--auth and --no-auth contradict each other")
        return user, password
    if args.share == "never" and is_local(args.host):
        return None
    if args.api_key:
        raise ValueError("whoever opens this page would ask with your key: give --auth")
    if not args.no_auth:
        raise ValueError("this page is open to others: give --auth USER:PASSWORD, or --no-auth")
    return None


def _port(text: str) -> int:
    if problem := port_problem(text):
        raise argparse.ArgumentTypeError(problem)
    return int(text)


def ask_this_machine_directly() -> None:
    """Have no proxy of the environment asked for what this machine answers."""
    kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if kept.strip() != "*":
        kept = ",".join(filter(None, [kept, "localhost", "127.0.0.1", "::1"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = kept


def end_with_stdin() -> None:
    """Wait for the end of standard input, then end this process whatever it is doing."""
    while sys.stdin.buffer.read(1024):
        pass
    os._exit(0)


def launch(
    args: argparse.Namespace, examples: Examples, results: Results, auth: tuple[str, str] | None
) -> Any:
    """Open the page and return it; None if it cannot listen there."""
    # Gradio reads these while it is imported, which takes seconds: not for `--help`.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    ask_this_machine_directly()
    from starlette.middleware import Middleware

    from .headers import WithHeaders
    from .page import build
    from .server import Server
    from .style import CSS, HEAD, theme

    server = Server(connect(args.endpoint, args.api_key))
    blocks = build(server, examples, results)
    open_here = auth is None and args.share == "never" and is_local(args.host)
    # Nobody else is to ask with a key, so no flag gives such a page other names.
    local_only = open_here and (args.api_key is not None or not args.no_auth)
    guard = Middleware(Guard, server=server, local_only=local_only)
    how = {
        "server_name": args.host,
        "server_port": args.port,
        "auth": auth,
        "share": args.share == "public",
        "css": CSS,
        "head": HEAD,
        # Else the browser would keep every call, and with it the admin key.
        "run_history": False,
        "app_kwargs": {"middleware": [Middleware(WithHeaders), guard]},
        # Gradio keeps a quarter of a megabyte of each; the longest unused is forgotten.
        "state_session_capacity": SESSIONS,
        "max_file_size": LARGEST_UPLOAD,
        "theme": theme(),
        "footer_links": [],
        "ssr_mode": False,
        "quiet": True,
        "prevent_thread_lock": True,
    }
    for tries_left in reversed(range(TRIES)):
        try:
            blocks.launch(**how)
            break
        except OSError:
            return None
        except ValueError as error:
            # Gradio asks the page once and waits three seconds, which a busy machine may exceed.
            if "localhost is not accessible" not in str(error) or not tries_left:
                raise
            blocks.close(verbose=False)
    return blocks


def _run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.until_stdin_closes:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        examples, auth = read_examples(args.examples), login(args)
        results = read_results(args.results)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    blocks = launch(args, examples, results, auth)
    if blocks is None:
        taken = f"cannot listen on {args.host}:{args.port}"
        raise ServeError(f"{taken}: is the port taken? Choose another with --port")
    # Gradio's own lines advertise a public link; without its lock it would return at once.
    print(
        f"secura-demo: {blocks.share_url or blocks.local_url} asks {without_login(args.endpoint)}",
        flush=True,
    )
    blocks.block_thread()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    return run_command("secura-demo", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
