"""Requests to the Hub over a bad network: what is tried again, how long is waited, and what an error says.

huggingface_hub repeats some requests and not others (2.4: never a commit, downloads not after a 5xx) and waits for
stalled ones without end. Here every request is repeated in the same way, and what cannot be mended by waiting becomes
one error with the Hub's own remedy. No message holds a token or the signed part of a URL.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of whichever client the Hub library stands on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled each time, unless the Hub says how long
STALL_SECONDS = 60.0  # without a byte sent or received
_PASSING_STATUS = (408, 425, 429)  # and 5xx
_LOGS_OF_URLS = ("huggingface_hub.utils._http", "httpx", "httpx2")
_SIGNED = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # what follows the path of a URL may be a signature
_TOKEN = re.compile(r"\b(hf_(?:jwt_)?|api_org_)[A-Za-z0-9]{8,}")
logger = logging.getLogger(__name__)
T = TypeVar("T")


def persist(
    call: Callable[[], T],
    doing: str,
    *,
    token: str | None = None,
    attempts: int = 0,
    stall_seconds: float = STALL_SECONDS,
) -> T:
    """The result of ``call``, repeated while what goes wrong may pass: 5xx, 429, timeouts, cut connections.

    A request on which nothing moves for ``stall_seconds`` is given up, and repeated. ``doing`` begins the message of
    the error: PermissionError, FileNotFoundError, ConnectionError when it did not pass in time, or OSError. Each says
    what to do.
    """
    attempts = attempts or ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            with _careful_session(stall_seconds):
                return call()
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: how the Hub library wraps a failed upload
            if isinstance(error, RuntimeError) and error.__cause__ is None:
                raise  # a bug
            if not may_pass(error) or attempt == attempts:
                raise explain(error, doing, token) from None
            wait = _seconds_to_wait(error, attempt)
            logger.warning("%s: %s; trying again in %.0f s", doing, _brief(error, token), wait)
            time.sleep(wait)
    raise AssertionError("attempts is at least 1")


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _PASSING_STATUS or _status(error) >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, HTTPError | ConnectionError | TimeoutError) or "Consistency check failed" in str(error)


def explain(error: BaseException, doing: str, token: str | None = None) -> OSError:
    """The error to raise instead: what was being done, what the Hub said, what to do."""
    error, known = _cause(error), token or get_token()
    said = _brief(error, token)
    if may_pass(error):
        return ConnectionError(f"{doing} failed again and again, at last with {said}. Run the same command once more.")
    if not isinstance(error, HfHubHTTPError):
        return error if isinstance(error, FileNotFoundError) else OSError(f"{doing}: {said}")
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{doing}: the repository is gated ({said}). Ask for access on its page under {constants.ENDPOINT}, "
            "with the account that the token belongs to."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{doing}: the repository has no such revision ({said}). Give one of its branches, "
                                 "tags or commits.")  # fmt: skip
    if _status(error) == 401 and known is not None:
        return PermissionError(
            f"{doing}: the Hub does not accept the token ({said}). It is wrong, revoked or has expired: make a new "
            f"one at {constants.ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    if _status(error) == 401:
        return PermissionError(
            f"{doing}: the Hub wants a token ({said}). The repository is private or does not exist: run `hf auth "
            "login` or set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{doing}: it does not exist, or it is private and this token may not see it ({said}). Check the name, or "
            "use a token of an account that has access."
        )
    if _status(error) == 403:
        return PermissionError(
            f"{doing}: this token may not do that ({said}). Use one with write permission for the repository, from "
            f"{constants.ENDPOINT}/settings/tokens, or --create-pr true."
        )
    return OSError(f"{doing}: {said}")


def masked(text: str, token: str | None = None) -> str:
    """``text`` without tokens and without what follows the path of a URL."""
    for secret in {token, get_token()} - {None, ""}:
        text = text.replace(secret, "***")
    return _TOKEN.sub(r"\1***", _SIGNED.sub(r"\1", text))


@contextmanager
def _careful_session(stall_seconds: float) -> Iterator[None]:
    """Gives up requests that stall, so that they can be repeated, and keeps signed URLs out of its logs.

    The Hub library's own session waits for ever. A limit that a session already has stays.
    """
    session, logs = get_session(), [logging.getLogger(name) for name in _LOGS_OF_URLS]
    before = session.timeout
    if before.read is None:
        session.timeout = stall_seconds
    for log in logs:
        log.addFilter(_mask_record)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(_mask_record)
        session.timeout = before


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = masked(record.getMessage()), None
    return True


def _cause(error: BaseException) -> BaseException:
    """What lies under the Hub library's wrapping."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | HTTPError):
        error = error.__cause__
    return error


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code


def _brief(error: BaseException, token: str | None) -> str:
    """Status and the server's words, or the kind of failure; never a URL with its query."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        words = [str(_status(error)), *(error.server_message or error.response.reason_phrase).split()]
        return masked(" ".join(words), token)
    return masked(" ".join([type(error).__name__, *str(error).split()]), token)


def _seconds_to_wait(error: BaseException, attempt: int) -> float:
    error = _cause(error)
    said = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    wait = float(said) if said.isdigit() else FIRST_WAIT * 2 ** (attempt - 1)
    return min(wait, LONGEST_WAIT) if not said.isdigit() else wait
