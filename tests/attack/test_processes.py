"""Proves that the server's processes live and end together, whoever ends first and whatever its
clients do.

A killed server leaves no process, port or shared memory behind, and the next start works; an engine
that dies ends the server with a status, one last line with the cause, and 503 for its clients; a
stop under load lets answers finish and cuts what does not, visibly; a client that does not read is
dropped; a clean stop says nothing of leaks.

Needs vLLM on a CPU, a tiny base and Linux's ``/dev/shm``. Servers listen on loopback, and processes
are ended by the ids that were recorded when they started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support import warm
from tests.support.engines import SERVE, free_port, random_adapter

FLAGS = (
    *("--enforce-eager", "--max-model-len", "8192", "--write-timeout", "3"),
    *("--hf-overrides", '{"max_position_embeddings": 8192}'),
)
LEAKS = ("leaked", "resource_tracker", "nanobind", "Traceback", "ASGI callable")
# Longer than a stop waits, on a fast machine too: 8,000 tokens of 64 answers.
LONG = {"prompt": "hi", "max_tokens": 8000, "ignore_eos": True, "n": 64}


@dataclass
class Server:
    """A server with all that it started, by process."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    family: list[psutil.Process] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def meet_family(self) -> None:
        self.family = psutil.Process(warm.pid(self.process)).children(recursive=True)

    def engine(self) -> psutil.Process:
        return self._named("EngineCore")

    def worker(self) -> psutil.Process:
        return self._named("Worker")

    def _named(self, part: str) -> psutil.Process:
        (one,) = [p for p in self.family if part in " ".join(p.cmdline())]
        return one

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120)

    def ask(self, **body: object) -> httpx.Response:
        return self.post("/v1/completions", **({"model": "base"} | LONG | body))

    def wait(self, seconds: float = 90) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.text()[-3000:]}")

    def alive(self, seconds: float = 30) -> list[psutil.Process]:
        """Who of the family has not ended after ``seconds``."""
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def start(tiny_base, tmp_path_factory) -> Iterator:
    """``start(*flags, port=, ready=, cold=)``: a server of the tiny base and a foldable adapter."""
    base = tiny_base("llama")
    folder = tmp_path_factory.mktemp("served")
    random_adapter(base, folder / "adapters" / "one", r=4, seed=1)
    servers: list[Server] = []

    def begin(*flags: str, port: int | None = None, ready: str = "", cold: bool = True) -> Server:
        port = port or free_port()
        log = folder / f"log-{len(servers)}"
        python = SERVE[0] if cold else warm.python("serve")
        command = [
            python,
            SERVE[1],
            "--base",
            str(base),
            "--adapters",
            str(folder / "adapters"),
            *FLAGS,
        ]
        command += ["--served-model-name", "base", "--port", str(port), *flags]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        servers.append(server := Server(process, port, log))
        _until(server, lambda: ready in server.text() if ready else _answers(server.url))
        server.meet_family()
        return server

    yield begin
    for server in servers:
        for process in (psutil.Process(), *server.family):
            if process.pid != os.getpid() and process.is_running():
                process.kill()
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def _until(server: Server, true) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert server.process.poll() is None, server.text()[-3000:]
        assert time.monotonic() < deadline, server.text()[-3000:]
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


@dataclass
class Load:
    """Requests under way: one that streams and one that does not."""

    stream: Future[str]
    plain: Future[httpx.Response]

    @staticmethod
    def on(server: Server, **body: object) -> Load:
        """Begin them, and wait until the server has both; a fast one may have answered by then,
        and is asked again."""
        for _ in range(20):
            load = Load._begin(server, body)
            while not (load.stream.done() or load.plain.done()):
                if _running(server) == 2 and not load.stream.done():
                    return load
                time.sleep(0.01)
        raise AssertionError(server.text()[-3000:])

    @staticmethod
    def _begin(server: Server, body: dict[str, object]) -> Load:
        pool = ThreadPoolExecutor(2)
        seen: list[str] = []

        def stream() -> str:
            # Few enough that a busy client still reads all of it before it is cut.
            asked = {"model": "base", "stream": True} | LONG | body | {"n": 8}
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json=asked, timeout=120
            ) as answer:
                assert answer.status_code == 200
                try:
                    seen.extend(answer.iter_text())
                except httpx.RemoteProtocolError as error:
                    seen.append(f"<{error}>")
            return "".join(seen)

        load = Load(pool.submit(stream), pool.submit(lambda: server.ask(**body)))
        pool.shutdown(wait=False)
        return load

    def assert_cut(self, said: str) -> None:
        """Neither looks like a whole answer, and neither like a crash."""
        answer, events = self.plain.result(60), self.stream.result(60)
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] and said in answer.json()["error"]["message"]
        last = [line for line in events.splitlines() if line.startswith("data: ")][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == 503 and said in error["message"]
        assert "[DONE]" not in events


def _running(server: Server) -> int:
    """How many requests the server has, as its own admin route counts them."""
    return int(httpx.get(f"{server.url}/admin/fold").json()["running_requests"])


def _bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _shared(server: Server) -> set[Path]:
    """The files of shared memory that the server's processes have mapped.

    Without named semaphores: joblib's, of 32 bytes, belong to no tracker.
    """
    maps = {Path(m.path) for p in server.family for m in p.memory_maps() if m.path[:1] == "/"}
    return {p for p in maps if p.parent == Path("/dev/shm") and p.exists() and p.stem != "sem"}


def _remaining(shared: set[Path], seconds: float = 15) -> list[Path]:
    """Those that are still there: the tracker removes them once the last process has ended."""
    deadline = time.monotonic() + seconds
    while (left := [p for p in shared if p.exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def restarted(start) -> tuple[Server, dict[str, object]]:
    """A server killed with its chat page up, what was left of it, and its successor on its port."""
    ui = free_port()
    server = start("--ui-port", str(ui))
    _until(server, lambda: "chat page: http" in server.text())
    server.meet_family()
    roles = [" ".join(p.cmdline()) for p in server.family]
    shared = _shared(server)
    server.process.kill()
    server.process.wait()
    left = {
        "alive": server.alive(20),
        "ports": [p for p in (server.port, ui) if not _bindable(p)],
        "shared": _remaining(shared),
        "roles": roles,
        "took": len(shared),
    }
    flags = ("--no-ui", "--shutdown-timeout", "4")
    return start(*flags, port=server.port, cold=False), left


def test_a_killed_server_leaves_nothing_behind(restarted):
    server, left = restarted
    for role in ("EngineCore", "Worker", "demo.app"):
        assert any(role in command for command in left["roles"]), left["roles"]
    assert left["took"] and left["shared"] == []
    assert left["alive"] == [] and left["ports"] == []
    assert server.ask(max_tokens=2, n=1).status_code == 200


def test_unknown_names_do_not_fill_the_log(restarted):
    server, _ = restarted
    message = {"role": "user", "content": "x"}
    with ThreadPoolExecutor(8) as pool:
        path = "/v1/chat/completions"
        asked = [
            pool.submit(server.post, path, model=f"no-{i}", messages=[message]) for i in range(100)
        ]
        assert {future.result().status_code for future in asked} == {404}
    assert server.text().count("does not exist") <= 5


def test_a_client_that_does_not_read_is_dropped(restarted):
    """And so does not hold a fold, which waits for running requests."""
    server, _ = restarted
    body = json.dumps({"model": "base", "stream": True} | LONG | {"n": 64, "logprobs": 5})
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        stalled.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        deadline = time.monotonic() + 60
        while not _running(server):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        begin = time.monotonic()
        assert server.post("/admin/fold", name="one", timeout=60).json()["changed"]
        assert time.monotonic() - begin < 45
        assert server.post("/admin/unfold").json()["changed"]
        rest = b"".join(iter(lambda: stalled.recv(1 << 20), b""))
    assert b"200 OK" in rest and b"[DONE]" not in rest


def test_a_stop_under_load_cuts_at_the_limit_and_is_clean(restarted):
    server, _ = restarted
    load = Load.on(server)
    server.meet_family()
    shared = _shared(server)
    assert shared
    server.process.terminate()
    _until(server, lambda: "secura-serve: stopping" in server.text())
    late = server.ask(n=1)
    assert late.status_code == 503 and late.headers["retry-after"]
    assert "stopping" in late.json()["error"]["message"]
    load.assert_cut("stopping")
    assert server.wait() == 0, server.text()[-3000:]
    assert server.alive() == [] and _remaining(shared) == []
    assert [word for word in LEAKS if word in server.text()] == []


def test_a_dead_worker_ends_the_server_with_its_cause(start):
    server = start("--no-ui", cold=False)
    load = Load.on(server)
    server.worker().kill()
    _assert_death(server, load, "VllmWorker-0")


@pytest.mark.slow
def test_a_dead_engine_process_ends_the_server_with_its_cause(start):
    server = start("--no-ui")
    load = Load.on(server)
    server.engine().kill()
    _assert_death(server, load, "SIGKILL")


def _assert_death(server: Server, load: Load, cause: str) -> None:
    load.assert_cut("engine has died")
    assert server.wait() == 1, server.text()[-3000:]
    last = server.text().rstrip().splitlines()[-1]
    assert last.startswith("secura-serve: error: the engine died: ") and cause in last, last
    assert server.alive() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_lets_running_requests_finish(number, start):
    """Ctrl-C in a terminal reaches every process, and so does a service manager's SIGTERM."""
    server = start("--no-ui", "--shutdown-timeout", "60")
    load = Load.on(server, n=4, max_tokens=1500)
    os.killpg(server.process.pid, number)
    assert load.plain.result(90).status_code == 200
    assert load.stream.result(90).rstrip().endswith("[DONE]")
    assert server.wait(120) == 0, server.text()[-3000:]
    assert server.alive() == [] and not [w for w in LEAKS if w in server.text()]


@pytest.mark.slow
def test_a_second_signal_does_not_wait_and_a_held_request_is_told(start):
    """During a fold that waits for running requests, with others held behind it."""
    server = start("--no-ui", "--shutdown-timeout", "60")
    load = Load.on(server, n=64)
    with ThreadPoolExecutor(2) as pool:
        folding = pool.submit(server.post, "/admin/fold", name="one")
        _until(server, lambda: httpx.get(f"{server.url}/admin/fold").json()["holding"])
        held = pool.submit(server.ask, n=1, max_tokens=2)
        time.sleep(0.5)
        begin = time.monotonic()
        server.process.terminate()
        time.sleep(0.5)
        server.process.terminate()
        load.assert_cut("stopping")
        assert held.result(30).status_code == 503
        assert folding.result(30).status_code in (409, 503)
        assert time.monotonic() - begin < 20
    assert server.wait() == 0, server.text()[-3000:]
    assert server.alive() == []


@pytest.mark.slow
def test_a_server_killed_while_it_starts_leaves_nothing_behind(start, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    server = start("--no-ui", ready="Starting to load model")
    server.process.kill()
    server.process.wait()
    assert server.alive() == [] and _bindable(server.port)
