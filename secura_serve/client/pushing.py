"""``push``: make an adapter the newest version of a name in a running server."""

from __future__ import annotations

import os
import ssl
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx

from secura_serve.adapter import Adapter, check_name
from secura_serve.addresses import url_problem
from secura_serve.client.contents import Contents, read_contents
from secura_serve.errors import ConfigError, PushError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Pushed", "check_target", "push"]

_NOT_ON_THIS_BASIS = (404, 409)


@dataclass(frozen=True)
class Pushed:
    """A push that the server has taken: the next request for ``name`` is answered with it."""

    name: str
    digest: str
    """The new version; ``name@digest`` asks for exactly this one."""
    seconds: float
    """From the call to the server's answer."""
    bytes_sent: int
    """Bodies of all requests; that includes a U that the server could not use alone."""
    whole: bool
    """Whether the whole adapter had to be sent, not U alone."""


def push(
    model: nn.Module | Adapter | str | os.PathLike[str],
    endpoint: str,
    name: str,
    *,
    api_key: str | None = None,
    adapter: str = "default",
    timeout: float = 60.0,
) -> Pushed:
    """Send an adapter to a running ``secura-serve`` and return once it is served.

    U alone is sent where the server's ``name`` has the same base, rows and columns, as it has
    after the first push of a training run. Otherwise the whole adapter is sent.

    Args:
        model: a PEFT model with a SECURA adapter, an :class:`Adapter`, or the folder of one.
        endpoint: URL of the server, with or without ``/v1``.
        name: what requests call the adapter; it is new, or gets a new version.
        api_key: the server's admin key; default ``$SECURA_ADMIN_API_KEY``. A server without one
            takes pushes from its own machine.
        adapter: the adapter's name inside a PEFT model.
        timeout: seconds to wait for a connection, and for each part of the exchange.

    Raises:
        PushError: the server refused the adapter, cannot be reached or is too slow. What it served
            before it still serves, unless the answer alone was lost.
        ConfigError: the name, the endpoint or the key is malformed, or the model has no adapter.
        AdapterFormatError: the adapter is not well-formed.
    """
    began = time.perf_counter()
    origin = check_target(endpoint, name)
    contents = read_contents(model, adapter)
    url = f"{origin}/v1/adapters/{name}"
    with httpx.Client(headers=_authorization(api_key), timeout=timeout, verify=_tls(url)) as client:
        answer = _put_core(client, url, contents)
        sent, whole = _size(answer), answer.status_code in _NOT_ON_THIS_BASIS
        if whole:
            answer = _put_whole(client, url, contents)
            sent += _size(answer)
    digest = _digest(answer, url)
    return Pushed(name, digest, time.perf_counter() - began, sent, whole)


def check_target(endpoint: str, name: str) -> str:
    """Return the endpoint without ``/v1``.

    Raises:
        ConfigError: it is no http or https URL, or ``name`` is no name of an adapter.
    """
    check_name(name)
    try:
        # It refuses more than urllib, such as a host that is no name.
        httpx.URL(endpoint)
    except httpx.InvalidURL as error:
        raise ConfigError(f"endpoint: got {endpoint!r}, which is no URL: {error}") from error
    if problem := url_problem(endpoint):
        raise ConfigError(f"endpoint: {problem}")
    return endpoint.rstrip("/").removesuffix("/v1")


def _authorization(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get("SECURA_ADMIN_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError("the admin key holds other than printable ASCII; it cannot be sent")
    return {"Authorization": f"Bearer {key}"} if key else {}


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _tls(url: str) -> ssl.SSLContext | bool:
    # Reading the certificates takes 40 ms, of which plain HTTP has no use.
    return _certificates() if url.startswith("https:") else False


def _put_core(client: httpx.Client, url: str, contents: Contents) -> httpx.Response:
    headers = {
        "Content-Type": "application/octet-stream",
        "X-Secura-Basis": contents.basis,
        "X-Secura-Magnorm": contents.magnorm,
    }
    return _put(client, f"{url}/weights", content=contents.core(), headers=headers)


def _put_whole(client: httpx.Client, url: str, contents: Contents) -> httpx.Response:
    files = [("files", (name, content)) for name, content in contents.files().items()]
    return _put(client, url, files=files)


def _put(client: httpx.Client, url: str, **body: Any) -> httpx.Response:
    try:
        return client.put(url, **body)
    except httpx.TimeoutException as error:
        limit = client.timeout.read
        raise PushError(
            f"{url}: no answer within {limit:g} s; give a longer timeout, or ask the server for "
            "its adapters: it may have taken this one"
        ) from error
    except httpx.RequestError as error:
        raise PushError(
            f"{url} cannot be reached ({error}); is the server running, and is that its address?"
        ) from error


def _size(answer: httpx.Response) -> int:
    return int(answer.request.headers.get("Content-Length", 0))


def _digest(answer: httpx.Response, url: str) -> str:
    """Return the digest of the version that the server has made.

    Raises:
        PushError: it has not made one.
    """
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.is_success and isinstance(body, dict) and isinstance(body.get("digest"), str):
        return str(body["digest"])
    error = body.get("error") if isinstance(body, dict) else None
    said = str(error.get("message")) if isinstance(error, dict) else answer.text[:200].strip()
    what = f"status {answer.status_code}" + (f": {said}" if said else "")
    if answer.is_success:
        what += " (not what secura-serve answers; is that its address?)"
    raise PushError(f"{url}: {what}", answer.status_code, said)
