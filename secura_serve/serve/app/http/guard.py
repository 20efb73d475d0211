"""Who may ask which route: the keys, the loopback rule, and no route that the table does not know.

vLLM's own check (``--api-key``) covers four path prefixes; this one covers the table of
``routes.py``, and stands in front of everything else of the app. It is handed to vLLM as a
``--middleware``, which vLLM cannot start without.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from secura_serve.serve.app.http.access import ASKING_KEY, Keys, is_loopback, is_loopback_host
from secura_serve.serve.app.http.context import context_of
from secura_serve.serve.app.http.errors import error_response
from secura_serve.serve.app.http.key_file import FileKey
from secura_serve.serve.app.http.routes import WEBSOCKET, Access, find_route, routed_path
from secura_serve.serve.logs import say

__all__ = ["GuardMiddleware", "refusal"]

# What says that a request came through something else, a proxy or a content network: words that
# their headers have in common, and how the names of some of them begin.
_FORWARDED = re.compile(
    r"forward|proxy|^via$|^x-host$|remote|originat|(client|connecting|real|source)-?(ip|addr|host)"
    r"|akamai|ngrok|tailscale|varnish|cloudfront|^x-client$|scheme$|^front-end-"
    r"|^(cf|cdn|fly|fastly|true|x-original|x-rewrite|x-envoy|x-azure|x-appengine|x-vercel|x-nf|"
    r"x-arr|x-amz-cf|x-amzn)-"
)
_WEB_PAGE = ("origin", "referer", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")


def bearer_token(headers: Headers) -> bytes:
    """Return the bearer token of a request; empty if it carries none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.encode("latin-1") if scheme.lower() == "bearer" else b""


def has_key(headers: Headers, keys: Iterable[str]) -> bool:
    """Return whether the request carries one of ``keys`` as a bearer token, in constant time."""
    given, same = bearer_token(headers), False
    for key in keys:
        same |= hmac.compare_digest(given, key.encode())
    return same


def key_of_file(headers: Headers, keys: Keys) -> FileKey | None:
    """Return the entry of ``--keys`` whose key the request carries, or None."""
    return keys.file.find(bearer_token(headers)) if keys.file is not None else None


def not_direct(headers: Headers, client: str) -> str | None:
    """Return why a request cannot be trusted to come from this machine's user, or None."""
    if strange := [n for n in headers if n in _WEB_PAGE or _FORWARDED.search(n.replace("_", "-"))]:
        return f"this one has the header {', '.join(dict.fromkeys(strange))}"
    if not is_loopback(client):
        return f"this came from {client or 'elsewhere'}"
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not is_loopback_host(hosts[0]):
        return f"this one was sent to the host {', '.join(hosts) or '(none named)'}"
    return None


def refusal(
    access: Access, headers: Headers, client: str, keys: Keys, key: FileKey | None = None
) -> tuple[int, str] | None:
    """Return status and sentence for a request that may not ask, or None.

    Args:
        access: what its route asks for.
        client: the caller's IP address.
        key: the entry of ``--keys`` whose key it carries.
    """
    if access == "admin":
        return _admin_refusal(headers, client, keys, key)
    # Who may change the server may ask it, too: a request carries one key.
    if access == "anyone" or not keys.needed or key is not None or has_key(headers, keys.plain):
        return None
    if keys.file is None:
        return 401, "this route needs the key given with --api-key, as a bearer token"
    flags = "--api-key or --keys" if keys.user else "--keys"
    return 401, f"this route needs a key of {flags}, as a bearer token"


def _admin_refusal(
    headers: Headers, client: str, keys: Keys, key: FileKey | None
) -> tuple[int, str] | None:
    if key is not None and key.role == "admin":
        return None
    if keys.admin is not None and has_key(headers, [keys.admin]):
        return None
    if keys.file is not None:
        return 401, 'the admin routes need a key of --keys with role = "admin", or --admin-api-key'
    if keys.admin is not None:
        return 401, "the admin routes need the key given with --admin-api-key"
    if (why := not_direct(headers, client)) is None:
        return None
    return 403, (
        "without --admin-api-key the admin routes answer direct requests on loopback only; " + why
    )


class GuardMiddleware:
    """In front of the whole app: asks for keys, and refuses routes that are not in the table."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("method") == "OPTIONS":
            await self.app(scope, receive, send)
            return
        keys = context_of(scope["app"]).keys
        key = key_of_file(Headers(scope=scope), keys)
        refused = self._refusal(scope, key)
        if refused is not None:
            status, message = refused
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            await error_response(status, message, headers=headers)(scope, receive, send)
            return
        if key is not None and keys.internal is not None:
            scope = _with_key(scope, keys.internal)
        before = ASKING_KEY.set(key)
        try:
            await self.app(scope, receive, send)
        finally:
            ASKING_KEY.reset(before)

    def _refusal(self, scope: Scope, key: FileKey | None) -> tuple[int, str] | None:
        context = context_of(scope["app"])
        if not context.attached:
            return 503, "this server lacks secura-serve's own routes; start it by secura-serve"
        method = WEBSOCKET if scope["type"] == "websocket" else str(scope["method"])
        client = (scope.get("client") or ("", 0))[0]
        route = find_route(routed_path(scope), method)
        if route is None or route.purpose == "refused":
            if not _mounted(scope):
                return None
            if route is None and method in ("GET", "HEAD"):
                return refusal("user", Headers(scope=scope), client, context.keys, key)
            return 501, (
                f"secura-serve does not serve {method} {scope['path'][:200]}: "
                "it does not know for which model and to whom this route may answer"
            )
        refused = refusal(route.access, Headers(scope=scope), client, context.keys, key)
        if refused is None and key is not None and route.access == "admin" and method != "GET":
            # The path in quotes: it may hold a line break.
            say(f"key {key.name}: {method} {scope['path'][:200]!r}")
        return refused


def _with_key(scope: Scope, key: str) -> Scope:
    """Return the request with another key, for what checks keys behind the guard."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    return {**scope, "headers": [*headers, (b"authorization", f"Bearer {key}".encode())]}


def _mounted(scope: Scope) -> bool:
    """Return whether the app would answer; if not, it says 404 or 405 itself."""
    routes: Sequence[Any] = scope["app"].routes
    return any(route.matches(scope)[0] is Match.FULL for route in routes)
