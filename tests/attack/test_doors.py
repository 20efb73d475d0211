"""Proves who may ask what: keys, the loopback rule, unknown routes, and the chat page's login.

Needs vLLM, but no engine: requests go through the real ASGI calls, to vLLM's own app where its
routes matter. Addresses beyond loopback are looked at in the resolved settings, never bound.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse

from secura_serve.errors import ConfigError
from secura_serve.serve.app import main as server
from secura_serve.serve.app.adapters.content.verifier import Verifier
from secura_serve.serve.app.adapters.library import Library
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.answers import Answers
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http import guard
from secura_serve.serve.app.http.access import Keys, PageAccess, is_loopback_host, page_access
from secura_serve.serve.app.http.context import ServerContext
from secura_serve.serve.app.http.routes import ROUTES, WEBSOCKET
from secura_serve.serve.app.main import read_flags
from secura_serve.serve.app.startup_messages import ready_notice, who_can_reach
from secura_serve.serve.app.vllm_flags import server_keys

pytest.importorskip("vllm")

NO_KEYS = Keys()
BOTH = Keys(("user-key", "second"), "admin-key")
MOUNTED = FastAPI()
MOUNTED.state.args = SimpleNamespace()


@MOUNTED.api_route("/new", methods=["GET", "POST", "DELETE"])
async def new():
    """A route of another vLLM."""


@MOUNTED.put("/v1/completions")
async def new_method():
    """A known path with a method that is not known."""


@MOUNTED.post("/adapters")
async def refused():
    """SageMaker's way to load any path."""


@MOUNTED.websocket("/v1/new")
async def new_socket(websocket):
    """A WebSocket of another vLLM."""


async def _answer(scope, receive, send):
    await PlainTextResponse("inside")(scope, receive, send)


def _context(keys, attached=False):
    library = Library(["base"])
    updates = AdapterUpdates(None, library, Verifier(lambda: None))
    folding = Folding(Path("base"), Answers(["base"], library))
    return ServerContext(folding, updates, keys, attached=attached)


def guarded(keys, attached=True):
    """Whatever the guard lets through is answered with 200."""
    _context(keys, attached).hand_over(MOUNTED.state.args)
    inner = guard.GuardMiddleware(_answer)

    async def app(scope, receive, send):
        await inner(scope | {"app": MOUNTED}, receive, send)

    return app


def ask(method, path, *, keys=NO_KEYS, client="127.0.0.1", headers=(), host="localhost:8000"):
    async def send():
        transport = httpx.ASGITransport(guarded(keys), client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as asking:
            return await asking.request(method, path, headers=headers)

    return asyncio.run(send())


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def paths(access):
    return [
        (method, route.path.replace("{rest:path}", "").replace("{", "").replace("}", ""))
        for route in ROUTES
        for method in route.methods
        if route.access == access and method != WEBSOCKET and route.purpose != "refused"
    ]


def test_whatever_generates_needs_a_key():
    assert ("POST", "/invocations") in paths("user") and ("POST", "/tokenize") in paths("user")
    for method, path in paths("user"):
        assert ask(method, path).status_code == 200
        for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": "user-key"}):
            answer = ask(method, path, keys=BOTH, headers=headers)
            assert answer.status_code == 401, (path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "--api-key" in answer.json()["error"]["message"]
        for key in ("user-key", "second", "admin-key"):
            assert ask(method, path, keys=BOTH, headers=bearer(key)).status_code == 200


def test_whatever_changes_the_server_needs_the_admin_key():
    changing = paths("admin")
    assert {("POST", "/scale_elastic_ep"), ("POST", "/collective_rpc")} <= set(changing)
    for method, path in changing:
        for headers in ({}, bearer("user-key"), bearer("second"), bearer("wrong")):
            assert ask(method, path, keys=BOTH, headers=headers).status_code == 401, path
        # With a key, from anywhere.
        answer = ask(method, path, keys=BOTH, headers=bearer("admin-key"), client="203.0.113.9")
        assert answer.status_code == 200


def test_reading_routes_stay_open():
    for method, path in paths("anyone"):
        assert ask(method, path, keys=BOTH, client="203.0.113.9").status_code == 200


def test_a_key_is_compared_whole_and_byte_by_byte():
    keys = Keys(("ключ",), None)
    assert ask("POST", "/score", keys=keys, headers=[(b"authorization", "Bearer ключ".encode())])
    for wrong in ("user-key ", "user", "USER-KEY", "user-key,second", "\xe9"):
        headers = [(b"authorization", f"Bearer {wrong}".encode("latin-1"))]
        assert ask("POST", "/score", keys=BOTH, headers=headers).status_code == 401


FORWARDING = (
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto",
    "X-Forwarded-Port", "X-Forwarded-Server", "X-Forwarded", "X-Real-IP", "CF-Connecting-IP",
    "CF-Ray", "True-Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "Fastly-Client-IP",
    "Client-IP", "X-ProxyUser-IP", "Proxy-Client-IP", "WL-Proxy-Client-IP", "X-Remote-IP",
    "X-Remote-Addr", "X-Originating-IP", "X-Original-URL", "X-Original-Host", "X-Rewrite-URL",
    "X-Envoy-External-Address", "X-Azure-ClientIP", "X-Azure-SocketIP", "X-Appengine-User-IP",
    "Fly-Client-IP", "X-NF-Client-Connection-IP", "DO-Connecting-IP", "X-Vercel-Forwarded-For",
    "CDN-Loop", "X-Host", "X_Forwarded_For", "Origin", "Sec-Fetch-Site",
)  # fmt: skip


@pytest.mark.parametrize("name", FORWARDING)
def test_without_an_admin_key_nothing_that_was_forwarded_is_answered(name):
    for method, path in (("GET", "/admin/fold"), ("POST", "/sleep")):
        answer = ask(method, path, headers={name: "127.0.0.1"})
        assert answer.status_code == 403 and name.lower() in answer.json()["error"]["message"]


def test_what_ordinary_clients_send_is_no_forwarding():
    usual = {
        "User-Agent": "curl/8.5", "Accept": "*/*", "Content-Type": "application/json",
        "X-Stainless-OS": "Linux", "X-Stainless-Runtime": "CPython", "X-Request-Id": "1",
        "Authorization": "Bearer none", "Traceparent": "00-1", "Priority": "u=0",
    }  # fmt: skip
    assert ask("POST", "/admin/unfold", headers=usual).status_code == 200


HOSTS = {
    "localhost": True, "localhost:8000": True, "LOCALHOST": True, "127.0.0.1": True,
    "127.0.0.1:8000": True, "127.8.9.10:1": True, "[::1]": True, "[::1]:8000": True,
    "[::ffff:127.0.0.1]:80": True, "evil.example": False, "evil.example:8000": False,
    "localhost.evil.example": False, "127.0.0.1.evil.example": False, "127.0.0.1@evil": False,
    "localhost:8000:1": False, "localhost, evil": False, "0.0.0.0": False, "127.1": False,
    "10.0.0.1": False, "::1": False, "[::1": False, "": False, "localhost:": False,
    "localhost:80a": False, "[localhost": False, "localhost\n": False, "2130706433": False,
}  # fmt: skip


def test_only_loopback_names_count_as_this_machine():
    assert {host: is_loopback_host(host) for host in HOSTS} == HOSTS


def test_a_web_page_that_calls_itself_this_machine_is_refused():
    """DNS rebinding: a browser reaches loopback by a name of the attacker's."""
    for host, good in {"evil.example": False, "localhost": True, "[::1]": True}.items():
        assert (ask("GET", "/admin/fold", host=host).status_code == 200) is good
    for headers in (
        [(b"host", b"localhost"), (b"host", b"evil.example")],
        [(b"host", b"")],
    ):
        assert ask("GET", "/admin/fold", headers=headers).status_code == 403
    for client, good in {"203.0.113.9": False, "::1": True, "::ffff:127.0.0.1": True}.items():
        assert (ask("GET", "/admin/fold", client=client).status_code == 200) is good


def test_a_route_that_the_table_does_not_know_is_not_served():
    for method in ("POST", "DELETE"):
        answer = ask(method, "/new", keys=BOTH, headers=bearer("admin-key"))
        assert answer.status_code == 501 and "does not serve" in answer.json()["error"]["message"]
    assert ask("PUT", "/v1/completions").status_code == 501
    assert ask("POST", "/adapters").status_code == 501
    assert ask("GET", "/new").status_code == 200
    assert ask("GET", "/new", keys=BOTH).status_code == 401
    # The app itself says 404 and 405 where it has nothing.
    assert ask("POST", "/nothing", keys=BOTH).status_code == 200
    assert ask("PATCH", "/health", keys=BOTH).status_code == 200


def test_web_sockets_need_the_key_too():
    client = TestClient(guarded(BOTH))
    for path, headers, status in (
        ("/v1/realtime", {}, 401),
        ("/v1/realtime", bearer("wrong"), 401),
        ("/v1/new", bearer("user-key"), 501),
    ):
        with pytest.raises(WebSocketDenialResponse) as refused:
            client.websocket_connect(path, headers=headers).__enter__()
        assert refused.value.status_code == status


def test_without_our_own_routes_nothing_is_answered():
    """vLLM goes on where a plugin cannot be loaded."""
    client = TestClient(guarded(NO_KEYS, attached=False))
    assert client.get("/health").status_code == 503
    assert client.post("/v1/completions", json={}).status_code == 503


CHANGING = (
    ("PUT", "/v1/adapters/x"),
    ("DELETE", "/v1/adapters/x"),
    ("PUT", "/v1/adapters/x/weights"),
    ("POST", "/v1/adapters/x/rollback"),
    ("POST", "/v1/adapters/x/pin"),
    ("POST", "/v1/adapters/reload"),
    ("PUT", "/v1/aliases/x"),
    ("DELETE", "/v1/aliases/x"),
)


@pytest.mark.parametrize("runtime_updating", ["", "1"])
def test_the_app_as_secura_serve_has_it_built(runtime_updating, monkeypatch):
    """Guard, plugin and vLLM's own check together: one key opens /v1, whichever it is. The routes
    that load adapters are ours, also where vLLM is told to mount its own."""
    from vllm.entrypoints.launchers.app import build_app

    from secura_serve.serve import compat, plugin

    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", runtime_updating or "0")
    plugin.choose_plugins()
    monkeypatch.setattr("vllm.envs.VLLM_PLUGINS", ["secura_admin"], raising=False)
    parser, _ = compat.make_arg_parser()
    middleware = "secura_serve.serve.app.http.guard.GuardMiddleware"
    args = parser.parse_args(["--api-key", "user-key", "--middleware", middleware])
    _context(Keys(("user-key",), "admin-key")).hand_over(args)
    app = build_app(args, ("generate",))
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    for path in ("/invocations", "/v1/completions", "/generative_scoring", "/tokenize"):
        assert client.post(path, json={}).status_code == 401, path
        for key in ("user-key", "admin-key"):
            # No engine: whoever is let in finds a request without a prompt, or no server.
            status = client.post(path, json={}, headers=bearer(key)).status_code
            assert status in (400, 500, 501), (path, status)
    load = {"lora_name": "x", "lora_path": "/etc"}
    for headers in ({}, bearer("user-key")):
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert client.post(path, json=load, headers=headers).status_code == 401
        for method, path in CHANGING:
            assert client.request(method, path, headers=headers).status_code == 401, path
    answer = client.post("/v1/load_lora_adapter", json=load, headers=bearer("admin-key"))
    assert answer.status_code == 400 and "without --adapters" in answer.json()["error"]["message"]
    for path in ("/v1/adapters", "/v1/adapters/x", "/v1/adapters/x/changes"):
        assert client.get(path).status_code == 401
        for key in ("user-key", "admin-key"):
            status = client.get(path, headers=bearer(key)).status_code
            assert status == (404 if "/x" in path else 200)
    status = client.post("/adapters", json={}, headers=bearer("admin-key")).status_code
    assert status == (501 if runtime_updating else 404)
    assert client.get("/version").status_code == 200
    assert client.post("/nothing").status_code == 404
    assert client.put("/version").status_code == 405
    assert_openai_errors(client)


def assert_openai_errors(client):
    """Check that what no handler is asked for is answered as OpenAI's clients expect."""
    key, text = bearer("user-key"), {"content-type": "application/json"} | bearer("user-key")
    asked = {
        ("GET", "/nothing", "NotFoundError", 404): {},
        ("GET", "/v1/nothing", "NotFoundError", 404): {"headers": key},
        ("PUT", "/version", "MethodNotAllowedError", 405): {},
        ("POST", "/v1/completions", "Bad Request", 400): {"content": "{", "headers": text},
        ("POST", "/tokenize", "Bad Request", 400): {"json": {"prompt": 3}, "headers": key},
        ("POST", "/admin/fold", "Bad Request", 400): {"json": {}, "headers": bearer("admin-key")},
    }
    for (method, path, kind, status), request in asked.items():
        answer = client.request(method, path, **request)
        body = answer.json()
        assert body.keys() == {"error"} and answer.status_code == status, (path, body)
        assert body["error"].keys() == {"message", "type", "param", "code"}, body
        assert body["error"]["type"] == kind and body["error"]["code"] == status, body
        if status in (404, 405):
            assert f"{method} {path}" in body["error"]["message"]
    assert client.put("/version").headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--api-key", ""], {}, "key of --api-key is empty"),
        (["--api-key", "good", ""], {}, "key of --api-key is empty"),
        (["--api-key", " "], {}, "key of --api-key is empty"),
        (["--api-key", "a\n"], {}, "blanks"),
        (["--admin-api-key", ""], {}, "--admin-api-key"),
        ([], {"VLLM_API_KEY": ""}, "VLLM_API_KEY"),
        ([], {"SECURA_ADMIN_API_KEY": ""}, "SECURA_ADMIN_API_KEY"),
        (["--api-key", "k1", "--api-key", "k2"], {}, "--api-key K1 K2"),
        (["--api-key", "k\u00e9y"], {}, "printable ASCII"),
        (["--admin-api-key", "a\nb"], {}, "printable ASCII"),
        (["--api-key", "k", "--admin-api-key", "k"], {}, "every user could change"),
        (["--max-loras", "0"], {}, "--max-loras 0"),
        (["--max-loras", "-1"], {}, "--max-loras -1"),
        (["--ui-host", "0.0.0.0"], {}, "--ui-auth"),
        (["--ui-host", ""], {}, "--ui-auth"),
        (["--ui-host", "192.0.2.7", "--ui-no-auth", "--api-key", "k"], {}, "lend it"),
        (["--ui-auth", "ann"], {}, "USER:PASSWORD"),
        ([], {"SECURA_UI_AUTH": ""}, "USER:PASSWORD"),
    ],
)
def test_a_start_that_would_open_a_door_is_refused(
    flags, environment, said, smollm2, monkeypatch, capsys
):
    def never(*_, **__):
        raise AssertionError("the server listens")

    # So that what the start sets is taken back.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr("vllm.entrypoints.launchers.api_server.entry.setup_server", never)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert server.main(["--base", str(smollm2), *flags]) != 0
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err
    assert "starting" not in shown.out


def test_keys_come_from_the_flag_or_else_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "from-outside")
    assert server_keys(SimpleNamespace(api_key=None), admin="a") == Keys(("from-outside",), "a")
    assert server_keys(SimpleNamespace(api_key=["x", "y"]), admin=None) == Keys(("x", "y"))


def test_the_chat_page_stays_on_loopback_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("SECURA_UI_AUTH", raising=False)
    known, rest = read_flags(["--host", "0.0.0.0", "--api-key", "k"])
    assert rest == ["--host", "0.0.0.0", "--api-key", "k"]
    keys = Keys(("k",))
    page = page_access(known.ui_host, login=known.ui_auth, no_login=known.ui_no_auth, keys=keys)
    assert page == PageAccess("127.0.0.1", None)
    for host in ("0.0.0.0", "::", "192.0.2.7", "some.host"):
        with pytest.raises(ConfigError, match="--ui-auth"):
            page_access(host, login=None, no_login=False, keys=NO_KEYS)
        with pytest.raises(ConfigError, match="lend it to whoever opens the page"):
            page_access(host, login=None, no_login=True, keys=keys)
        page_access(host, login=None, no_login=True, keys=NO_KEYS)
        page_access(host, login="ann:secret", no_login=False, keys=keys)
    for login in ("", "ann", ":", "ann:", ":secret"):
        with pytest.raises(ConfigError, match="USER:PASSWORD"):
            page_access(None, login=login, no_login=False, keys=NO_KEYS)
    with pytest.raises(ConfigError, match="contradict"):
        page_access(None, login="ann:secret", no_login=True, keys=NO_KEYS)


@pytest.mark.long
def test_the_demo_keeps_strangers_out_in_the_same_way(monkeypatch):
    from demo import app

    for name in ("SECURA_UI_AUTH", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def login(*flags):
        return app.login(app.parser().parse_args(flags))

    assert login() is login("--host", "localhost") is login("--api-key", "k") is None
    assert login("--host", "0.0.0.0", "--auth", "ann:a:b") == ("ann", "a:b")
    assert login("--host", "0.0.0.0", "--no-auth") is None
    for flags in (
        ("--host", "0.0.0.0"),
        ("--share", "public"),
        ("--share", "public", "--api-key", "k", "--no-auth"),
        ("--auth", ""),
        ("--auth", "ann:a", "--no-auth"),
    ):
        with pytest.raises(ValueError, match="--auth"):
            login(*flags)


def test_the_start_says_who_can_reach_what():
    def told(host="127.0.0.1", keys=NO_KEYS, page=None):
        args = SimpleNamespace(host=host, port=8000, uds=None)
        text = who_can_reach(args, keys, page, 7860)
        # What is said again when the server is ready has the same doors and warnings.
        short = ready_notice(args, keys, page, endpoint="http://there:8000", page_port=7860)
        assert text.partition("warning")[2] == short.partition("warning")[2]
        for fact in ("also other machines", "a key of --api-key", "--admin-api-key", "--ui-auth"):
            assert (fact in text) == (fact in short)
        return text

    alone = told(page=PageAccess())
    assert "127.0.0.1:8000 (this machine only), without a key" in alone
    assert "127.0.0.1:7860 (this machine only), without a login" in alone
    assert "/health" in alone and "/metrics" in alone and "warning" not in alone
    for host in ("0.0.0.0", "::", "192.0.2.7", "", None):
        assert "warning: whoever reaches" in told(host) and "also other machines" in told(host)
        assert "warning" not in told(host, BOTH)
    shared = told("0.0.0.0", BOTH, PageAccess("0.0.0.0", "ann:secret"))
    assert "with a key of --api-key" in shared and "with the key of --admin-api-key" in shared
    assert "with the login of --ui-auth" in shared
    for secret in ("ann", "secret", "user-key", "second", "admin-key"):
        assert secret not in shared
    assert "can use the chat page" in told(page=PageAccess("0.0.0.0"))
