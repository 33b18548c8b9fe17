"""Requests to an inference server: in the background, repeated, and patient while it is away."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from limbeck.errors import ConfigError, TryLaterError

T = TypeVar("T")

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
"""Bounds of the pause before a request is repeated; it doubles each time."""

CONNECT_TIMEOUT_S = 10.0
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that is busy, starting or broken; the same request may succeed later."""

QUOTED = 300
"""Characters of a server's own words that a message repeats."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a server is reached.

    Attributes:
        url: Of the server, without `/v1`.
        key: Sent as a bearer token; None sends none.
        concurrency: Requests in flight at once.
        timeout_s: Longest wait for one answer.
        patience_s: Longest wait for a server that has gone away.
        section: Of the recipe, in messages.
    """

    url: str
    key: str | None = field(repr=False)
    concurrency: int
    timeout_s: float
    patience_s: float
    section: str = "teacher"


class Away(Exception):  # noqa: N818  (a state of the server, never raised to a user)
    """The server did not answer or is busy; `pause_s` is the pause it asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class RefusedError(ConfigError):
    """The server answered that it will not do what was asked."""


class Server:
    """An inference server that speaks JSON over HTTP.

    Attributes:
        outages: How often it went away and came back.
    """

    def __init__(self, connection: Connection, say: Callable[[str], None]) -> None:
        """
        Args:
            say: Called with a line for the user when the server goes away and when it is back.
        """
        self.connection = connection
        self.outages = 0
        key, most = connection.key, connection.concurrency
        self._client = httpx2.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(connection.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
            follow_redirects=False,  # a redirect would hand the key to another host
        )
        weakref.finalize(self, self._client.close)
        self._say = say
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._num_threads = 0

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run a job that calls `ask` in the background, in the order of the calls.

        The threads are daemons and end when there is nothing to do: a server that never answers
        does not keep a finished process alive.
        """
        future: Future[T] = Future()
        with self._lock:
            self._jobs.append((future, job))
            if self._num_threads < self.connection.concurrency:
                self._num_threads += 1
                threading.Thread(target=self._work, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._num_threads -= 1
                    return
                future, job = self._jobs.popleft()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, patience_s: float | None = None
    ) -> Any:
        """The JSON that the server answers to a GET, or to a POST of a body.

        Args:
            path: Below the server's URL.
            body: Sent as JSON.
            patience_s: Longest wait while the server is away; the connection's by default.

        Raises:
            RefusedError: The server will not do this.
            TryLaterError: It did not answer for too long.
        """
        patience_s = self.connection.patience_s if patience_s is None else patience_s
        started, delay = time.monotonic(), FIRST_DELAY_S
        while True:
            try:
                answer = self._attempt(path, body)
            except Away as away:
                waited = time.monotonic() - started
                if waited >= patience_s:
                    raise TryLaterError(
                        f"The server {self.connection.url} must answer, and did not for "
                        f"{waited:,.0f} s: {away}. Start it and try again (a run continues with "
                        f"--resume), or raise {self.connection.section}.patience_s."
                    ) from away
                if delay > FIRST_DELAY_S:
                    self._went_away(str(away), patience_s)
                time.sleep(min(max(delay, away.pause_s), LONGEST_DELAY_S, patience_s - waited))
                delay *= 2
            else:
                self._came_back()
                return answer

    def _went_away(self, reason: str, patience_s: float) -> None:
        with self._lock:
            if self._away_since is not None:
                return
            self._away_since = time.monotonic()
        self._say(
            f"the server {self.connection.url} is away ({reason}); waiting for it, up "
            f"to {patience_s:,.0f} s."
        )

    def _came_back(self) -> None:
        with self._lock:
            if self._away_since is None:
                return
            seconds = time.monotonic() - self._away_since
            self._away_since = None
            self.outages += 1
        self._say(f"the server {self.connection.url} is back after {seconds:,.0f} s; resuming.")

    def _attempt(self, path: str, body: Mapping[str, Any] | None) -> Any:
        method, url = "GET" if body is None else "POST", self.connection.url + path
        try:
            response = self._client.request(method, url, json=body)
        except httpx2.TransportError as error:
            raise Away(f"{type(error).__name__}: {str(error) or 'no answer'}") from error
        status = response.status_code
        if status in RETRIED:
            raise Away(f"status {status}: {words_of(response)}", pause_of(response))
        if status != 200:
            raise RefusedError(refusal(url, response, self.connection.section))
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise RefusedError(
                f"{self.connection.section}.url: {url} must answer in JSON, and answered "
                f"{words_of(response)!r}. Give the address of the inference server itself."
            ) from error


def refusal(url: str, response: httpx2.Response, section: str) -> str:
    """Why a server will not answer, and what to do."""
    status = response.status_code
    if response.is_redirect:
        return (
            f"{section}.url: {url} must answer itself, and redirects to "
            f"{response.headers.get('location', 'nowhere')[:QUOTED]!r}, which is not followed: the "
            "key would go along. Give the final address."
        )
    if status in (401, 403):
        return (
            f"{section}.key_env: the server {url} must accept the key, and answered with status "
            f"{status}: {words_of(response)}. Name the environment variable that holds its key."
        )
    if status == 404:
        return (
            f"{section}.url: {url} must be there, and is not: {words_of(response)}. Give the "
            "address of a vLLM server (or SGLang, with teacher.server: sglang), without /v1, and "
            "the model's name as it serves it."
        )
    return f"{section}: {url} refused the request with status {status}: {words_of(response)}"


def words_of(response: httpx2.Response) -> str:
    """The server's own message: that of an OpenAI error, or the first characters of the body."""
    try:
        error = response.json()["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError, RecursionError):
        text = response.text
    return " ".join(str(text).split())[:QUOTED]


def pause_of(response: httpx2.Response) -> float:
    """The seconds that `Retry-After` asks for; 0 if there are none."""
    value = response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,6}", value) else 0.0


def checked_url(url: str, section: str = "teacher") -> str:
    """A server's address without a trailing slash or `/v1`.

    Raises:
        ConfigError: It is not http or https, or it has a user, a query or a fragment.
    """
    try:
        parsed = httpx2.URL(url)
        has_host = re.fullmatch(r"[\w.:-]+", parsed.host) is not None
        is_server = parsed.scheme in ("http", "https") and has_host
    except httpx2.InvalidURL:
        is_server = False
    if not is_server:
        raise ConfigError(
            f"{section}.url: must be the http:// or https:// address of a server, as "
            f"http://localhost:8000, got {url!r}."
        )
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigError(
            f"{section}.url: must have no user, password, query or fragment, which end up in "
            f"reports. Name the environment variable of a key in {section}.key_env."
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def key_of(name: str | None, section: str = "teacher") -> str | None:
    """The key in an environment variable; None for no name.

    Raises:
        ConfigError: The name is not one of a variable, or the variable holds no key.
    """
    if name is None:
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
        raise ConfigError(
            f"{section}.key_env: must be the name of an environment variable, as VLLM_API_KEY, and "
            "is not one. If this is the key itself, replace it: it may be in logs now."
        )
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{section}.key_env: the environment variable {name} must hold the server's key, and "
            f"{'holds characters that no key has' if key else 'is not set'}. Export it."
        )
    return key
