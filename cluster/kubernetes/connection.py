"""Connection to Kubernetes' API server, through the official client. Blocks; every call has a deadline.

The client reads the pod's token again when it changes. Its own retries are off: the callers decide when to try again.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from ...core.errors import ConfigError

CONNECT_S = 3.0
ANSWER_S = 10.0  # longest silence within an answer, but for a watch
MAX_ANSWER_BYTES = 32 << 20
MAX_EVENT_BYTES = 4 << 20  # a slice of 1,000 endpoints has half of one

Object = dict[str, Any]


class ApiAway(Exception):
    """The API server did not answer, or its answer broke off."""


class ApiRefused(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def connect() -> Any:
    """The official client's `ApiClient`: with the pod's own account, else as KUBECONFIG or ~/.kube/config says.

    Raises:
        ConfigError: the client is not installed, or nothing says where the API server is.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError(
            "the package kubernetes is not installed, and k8s:// needs it: pip install 'twostroke[kubernetes]'"
        ) from None
    settings = client.Configuration()
    files: Any = config  # its functions have no types
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            files.load_incluster_config(client_configuration=settings)
        else:
            files.load_kube_config(client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            f"no way to Kubernetes' API server: {error}; a pod needs its token (automountServiceAccountToken: true), "
            "another process KUBECONFIG"
        ) from None
    settings.retries = False
    return client.ApiClient(settings)


def answer_of(call: Callable[..., Any], *arguments: Any, silence_s: float = ANSWER_S, **named: Any) -> Object:
    """What one call of the client answers, as plain JSON; `silence_s`: the longest within it.

    Raises:
        ApiAway, ApiRefused
    """
    response = opened(call, *arguments, read_s=silence_s, **named)
    try:
        return _object(_read(response))
    finally:
        response.close()


def opened(call: Callable[..., Any], *arguments: Any, read_s: float, **named: Any) -> Any:
    """The response (urllib3) of a call whose body is not read yet; `read_s`: longest silence. The caller closes it.

    Raises:
        ApiAway, ApiRefused
    """
    from urllib3.exceptions import HTTPError

    try:
        response = call(*arguments, _preload_content=False, _request_timeout=(CONNECT_S, read_s), **named)
    except (HTTPError, OSError) as error:
        raise ApiAway(_short(error)) from None
    except Exception as error:  # the client's own type for a refusal is another one in each of its generations
        status = getattr(error, "status", None)
        if not isinstance(status, int) or status == 0:
            raise ApiAway(_short(error)) from None
        raise ApiRefused(status, _reason_in(str(getattr(error, "body", "") or error))) from None
    if not 200 <= response.status < 300:
        try:
            text = _read(response).decode(errors="replace")
        finally:
            response.close()
        raise ApiRefused(response.status, _reason_in(text))
    return response


def events_of(response: Any, most_s: float) -> Generator[Object, None, None]:
    """The lines of a watch as they come. Ends when the server ends it.

    Raises:
        ApiAway: it broke off, was silent for too long, lasted longer than `most_s`, or a line is too long.
    """
    from urllib3.exceptions import HTTPError

    rest, end_s = b"", time.monotonic() + most_s
    try:
        for piece in response.stream(amt=None, decode_content=False):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                if line.strip():
                    yield _object(line)
            if len(rest) > MAX_EVENT_BYTES:
                raise ApiAway(f"an event has more than {MAX_EVENT_BYTES} bytes")
            if time.monotonic() > end_s:
                raise ApiAway(f"the watch did not end within {most_s:.0f} s, as it was asked to")
    except (HTTPError, OSError, ValueError) as error:  # ValueError: it was closed by another thread
        raise ApiAway(_short(error)) from None


def cut(response: Any) -> None:
    """End the reading of a response in another thread."""
    connection = getattr(response, "connection", None) or getattr(response, "_connection", None)
    if (sock := getattr(connection, "sock", None)) is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _read(response: Any) -> bytes:
    """The whole body, within bounds of time and size."""
    from urllib3.exceptions import HTTPError

    pieces, size, end_s = list[bytes](), 0, time.monotonic() + 2 * ANSWER_S
    try:
        for piece in response.stream(amt=1 << 16, decode_content=True):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER_BYTES or time.monotonic() > end_s:
                raise ApiAway(f"the answer has more than {MAX_ANSWER_BYTES} bytes, or took {2 * ANSWER_S:.0f} s")
    except (HTTPError, OSError) as error:
        raise ApiAway(_short(error)) from None
    return b"".join(pieces)


def _object(text: bytes) -> Object:
    try:
        value = json.loads(text)
    except ValueError:
        raise ApiAway(f"the answer is no JSON: {text[:60]!r}") from None
    if not isinstance(value, dict):
        raise ApiAway(f"the answer is no object: {text[:60]!r}")
    return value


def _reason_in(text: str) -> str:
    """The message of a Status object, or what there is."""
    with suppress(ValueError, AttributeError):
        text = str(json.loads(text).get("message") or text)
    return text[:300]


def _short(error: BaseException) -> str:
    """The innermost cause of a client's error, in one line."""
    cause: BaseException = getattr(error, "reason", None) or error  # urllib3 wraps what happened
    return f"{type(cause).__name__}: {cause}"[:300] if isinstance(cause, BaseException) else str(cause)[:300]
