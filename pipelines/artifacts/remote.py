"""Requests to object stores: tried again with full jitter, bounded in total time, told in one line without secrets.

Which store a URL names, and its credentials, is fsspec's business: they come from the environment or from the files
of the store's own tools, never from a URL or a config. The store libraries' own retries are switched off where that
can be done, so that one policy decides.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import tenacity

from kinema.pipelines.errors import StageError

Value = TypeVar("Value")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 20.0
_SAY_AFTER_S, _SAY_EVERY_S = 5.0, 30.0
_FINAL = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
)  # fmt: skip
# HTTP statuses and error codes that say "not now" rather than "no".
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset("SlowDown RequestTimeout BadDigest IncompleteBody InternalError ServiceUnavailable".split())
# Errors of the connection itself, by name: their libraries are optional.
_PASSING_CLASSES = frozenset(
    "ClientPayloadError ClientConnectionError ServerTimeoutError HTTPClientError ConnectionError ConnectionClosedError "
    "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ResponseStreamingError IncompleteReadError "
    "IncompleteRead ProtocolError FSTimeoutError TimeoutError ServiceRequestError ServiceResponseError".split()
)
_OPTIONS: dict[str, dict[str, Any]] = {
    name: {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}} for name in ("s3", "s3a")
}
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CLIENT_SECRET",
    "GOOGLE_OAUTH_ACCESS_TOKEN", "GOOGLE_TOKEN", "HADOOP_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
)  # fmt: skip
_SECRET_FIELDS = re.compile(
    r"(?i)((?:x-amz-(?:signature|credential|security-token)|signature|sig|sas|awsaccesskeyid|access_?token|token|"
    r"account_?key|secret|password)=)[^&\s\"']+"
)
_USER_INFO = re.compile(r"(://)[^/@\s]*:[^/@\s]*@")


class Refused(StageError):
    """A store's final answer about one object: access denied, an address that it does not take."""


class Unfinished(OSError):
    """A request that was cut, or whose end is not known: worth another try."""


def without_secrets(text: str) -> str:
    """The text with credentials of the environment, signatures, tokens and passwords in URLs replaced by `***`."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET_FIELDS.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def check_url(url: str) -> str:
    """The URL itself. Raises: ValueError, which does not repeat them, when it carries credentials."""
    if _USER_INFO.search(url) or _SECRET_FIELDS.search(url):
        raise ValueError(
            f"{without_secrets(url)} carries credentials, which would end in manifests and logs; set them in the "
            "environment (AWS_ACCESS_KEY_ID, ...) and leave them out of the URL"
        )
    return url


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a URL, cached by fsspec and made anew in another process, and the path in it."""
    protocol = url.partition("://")[0]
    found, path = fsspec.core.url_to_fs(url, **_OPTIONS.get(protocol, {}))
    if protocol in _OPTIONS:
        found.retries = 1
    return found, path


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: overload, lost connections, bodies that were cut."""
    if isinstance(error, Unfinished):
        return True
    if isinstance(error, _FINAL):
        return False
    if {kind.__name__ for kind in type(error).__mro__} & _PASSING_CLASSES:
        return True
    status, code = _answer(error)
    if status is not None or code:
        return status in _PASSING_STATUS or code in _PASSING_CODES
    return isinstance(error, OSError) and bool(str(error)) and "Errno 22" not in str(error)


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and error code of a store's answer, from the error or what caused it."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        for name in ("status_code", "status", "code"):
            value = getattr(found, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value, ""
    return None, ""


def total_seconds() -> float:
    """How long one request may take, all tries together: KINEMA_STORE_TIMEOUT_S, else 300.

    Raises: ValueError when it is no positive number.
    """
    text = os.environ.get("KINEMA_STORE_TIMEOUT_S", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"KINEMA_STORE_TIMEOUT_S={text} is not a positive number of seconds; use 300, for example")
    return seconds


def call(url: str, request: Callable[[], Value]) -> Value:
    """The value of `request()`, which is tried again while its failure may pass.

    Waits are drawn evenly from 0 to a bound that doubles from try to try (full jitter), so that many workers that
    were refused together do not come back together.
    Raises: FileNotFoundError, FileExistsError as they come; Refused (a StageError), one line, when the store refuses;
        StageError when it has not answered within `total_seconds()`.
    """
    bound_s, started = total_seconds(), time.monotonic()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_passing),
        wait=_full_jitter,
        stop=tenacity.stop_before_delay(bound_s),
        before_sleep=lambda state: _say(url, state),
        reraise=True,
    )
    try:
        return retrying(request)
    except (FileNotFoundError, FileExistsError, StageError, ValueError):
        raise
    except PermissionError as error:
        raise Refused(
            f"{url}: access denied ({one_line(error)}); check the credentials in the environment and the bucket's rules"
        ) from None
    except Exception as error:  # noqa: BLE001  every store library has its own
        if is_passing(error):
            waited_s = time.monotonic() - started
            raise StageError(
                f"{url} does not answer for {waited_s:.0f} s ({one_line(error)}); run the same command again later, or "
                "set KINEMA_STORE_TIMEOUT_S higher"
            ) from None
        if "redential" in str(error):
            raise Refused(f"{url}: {one_line(error)}; set the store's credentials in the environment") from None
        raise Refused(f"{url}: {one_line(error)}") from None


# Its own: threads that copy a run or fetch shards would change the numbers of the training step under way.
_jitter = random.Random()


def _full_jitter(state: tenacity.RetryCallState) -> float:
    return _jitter.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(state.attempt_number - 1, 20)))


def one_line(error: BaseException) -> str:
    """What an error says, on one line, without secrets."""
    return without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__


_said_lock = threading.Lock()
_said_at = float("-inf")


def _say(url: str, state: tenacity.RetryCallState) -> None:
    """A store that keeps refusing is told on stderr, at most every half minute in a process."""
    global _said_at
    since, now = state.seconds_since_start or 0.0, time.monotonic()
    with _said_lock:
        if since < _SAY_AFTER_S or now - _said_at < _SAY_EVERY_S:
            return
        _said_at = now
    error = state.outcome.exception() if state.outcome else None
    why = one_line(error) if error else "no answer"
    sys.stderr.write(f"store: {url}: {why}; try {state.attempt_number} failed after {since:.0f} s, trying again\n")
    sys.stderr.flush()
