"""The chat page, started beside the server as a process of its own; it speaks HTTP only."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

from secura_serve.errors import ServeError
from secura_serve.page_module import CHECKOUT, IN_CHECKOUT, page_module
from secura_serve.serve.app.http.access import PageAccess
from secura_serve.serve.logs import follow, is_json, say
from secura_serve.system.os_errors import reason

__all__ = ["ChatPage"]

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy of the environment cannot reach this machine's own addresses."""


def _command() -> list[str] | None:
    """Return how to start the page, from a checkout or an installed wheel; None without gradio."""
    module = page_module()
    if module is None or importlib.util.find_spec("gradio") is None:
        return None
    # Without -P, Python would prefer a folder `demo` in the current one.
    path = ["-P"] if str(CHECKOUT) in sys.path and module == IN_CHECKOUT else []
    return [sys.executable, *path, "-m", module]


class ChatPage:
    """Context manager: waits in the background until the server answers, then opens the page.

    Args:
        endpoint: ``http://host:port`` of the server.
        access: where the page listens, and its login.
        port: of the page.
        api_key: passed on by environment like the login, so that it shows in no process list.
        examples: JSON file of example prompts per adapter.
        results: JSON file of an experiment, whose variants the page draws beside the adapters.
        enabled: False does nothing.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        access: PageAccess,
        port: int,
        api_key: str | None,
        examples: Path | None,
        results: Path | None,
        enabled: bool,
    ) -> None:
        self.endpoint, self.host, self.port = endpoint, access.host, port
        self.login, self.open = access.login, access.open
        self.api_key, self.enabled = api_key, enabled
        self.files = {"--examples": examples, "--results": results}
        self._process: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._announce, daemon=True)

    def check_port(self) -> None:
        """Raise ServeError if the page could not listen; better now than after the engine."""
        if not self.enabled:
            return
        try:
            with socket.create_server((self.host, self.port)):
                pass
        except (OSError, OverflowError) as error:
            raise ServeError(
                f"the chat page cannot listen on {self.host}:{self.port} ({reason(error)}); choose "
                "another --ui-port, or leave the page out with --no-ui"
            ) from error

    def __enter__(self) -> ChatPage:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _announce(self) -> None:
        if not self.enabled or not self._wait(f"{self.endpoint}/health"):
            return
        command = _command()
        if command is None:
            say("no chat page: pip install 'secura-serve[demo]' (or start with --no-ui)", prefix="")
            return
        command += ["--endpoint", f"{self.endpoint}/v1", "--host", self.host]
        command += ["--port", str(self.port)]
        for flag, file in self.files.items():
            if file is not None:
                command += [flag, str(file)]
        # The page needs neither the operator's key nor a login that it was not given.
        ours = ("SECURA_ADMIN_API_KEY", "SECURA_UI_AUTH")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        if self.login:
            environment["SECURA_UI_AUTH"] = self.login
        elif self.open:
            command.append("--no-auth")
        if self.api_key:
            environment["VLLM_API_KEY"] = self.api_key
        # The pipe closes with this process, however that ends, and the page ends with the pipe. A
        # session of its own: a Ctrl-C in the terminal is for the server, which then ends the page.
        command += ["--until-stdin-closes"]
        if is_json():
            environment["PYTHONUNBUFFERED"] = "1"
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if is_json() else None,
            stderr=subprocess.STDOUT if is_json() else None,
            start_new_session=True,
        )
        if self._process.stdout is not None:
            follow(self._process.stdout, "secura_serve.chat_page")
        shown = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        if self._wait(f"http://{shown}:{self.port}/"):
            say(f"chat page: http://{shown}:{self.port}", prefix="")

    def _wait(self, url: str) -> bool:
        """Wait for ``url``: True once it answers, False when told to stop or the page has ended."""
        while self._process is None or self._process.poll() is None:
            try:
                with _DIRECT.open(url, timeout=2):
                    return True
            except (OSError, HTTPException):
                if self._stop.wait(1.0):
                    return False
        return False
