"""Sends requests of reward sources over HTTP: JSON in, JSON out, several at a time.

Uses the standard library's client in threads, since our dependencies share no other client: which
one huggingface_hub installs depends on its version. Each request opens its own connection, so there
are no stale connections after a service restarts. Redirects are not followed and proxies are not
used, so that the token is only sent to the configured host.
"""

import contextlib
import http.client
import os
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from engine.config.sections.reward import HTTPConfig
from engine.errors import UserInputError, error_text, shortened
from engine.examined import examined
from engine.tls import https_hint, tls_problem

MAX_REPLY = 64 * 2**20
"""Most bytes of a reply that are read."""
SHOWN_CHARACTERS = 200
"""Characters of a reply in an error message."""
REPORT_INTERVAL = 1.0
"""Seconds between reports of progress while requests are on their way."""
REQUEST_THREADS = "reward-request"
"""Beginning of the names of threads that wait for replies."""

T = TypeVar("T")


class RequestError(Exception):
    """A request got no usable reply; the message is one line without the token."""

    down = True
    """Whether further requests would probably fail as well."""

    def __init__(self, text: str, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after
        """Seconds that the service asks to wait before the next request."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests are sent, and how."""

    url: str
    timeout: float
    """Seconds for a whole request."""
    concurrency: int
    token: str | None = field(default=None, repr=False)
    """The bearer token."""

    @classmethod
    def of(cls, url: str, config: HTTPConfig) -> "Endpoint":
        """An endpoint with the token that the environment holds.

        Args:
            url: its URL, checked by the rules.
            config: time limit, concurrency and the variable's name.

        Raises:
            UserInputError: the environment variable is not set, or cannot be a token.
        """
        return cls(url, config.timeout, config.concurrency, read_token(config))

    @property
    def place(self) -> str:
        """Host, port and path, for messages: a query may hold a key."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    @cached_property
    def tls_context(self) -> ssl.SSLContext:
        """Returns the cached context that verifies certificates; reading the trusted ones is slow.

        They are read again after a certificate was rejected, since it may be trusted by now.
        """
        return ssl.create_default_context()

    def post(self, body: bytes) -> bytes:
        """Sends JSON and returns the body of the reply.

        Any thread may call it. It returns within the time limit, except that resolving the host
        name and connecting to several of its addresses can take longer.

        Raises:
            RequestError: no reply, or a status other than 2xx.
        """
        exchange = _Exchange(self)
        try:
            status, headers, reply = exchange.run(body)
        # UnicodeError: the host name is not a valid internationalised domain name.
        except (OSError, http.client.HTTPException, UnicodeError, _TooLongError) as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                vars(self).pop("tls_context", None)
            raise RequestError(
                f"{self.place}: {self.hide_secrets(exchange.reason(error))}"
            ) from None
        if 200 <= status < 300:
            return reply
        raise RequestError(self._refusal(status, headers, reply), _retry_after(headers))

    def _refusal(self, status: int, headers: http.client.HTTPMessage, reply: bytes) -> str:
        reason = http.client.responses.get(status, "")
        text = f"{self.place}: HTTP {status} {reason}".rstrip()
        if 300 <= status < 400 and (target := headers.get("Location")):
            shown = self.hide_secrets(target)[:SHOWN_CHARACTERS]
            text += f", a redirect to {shown}: give the URL that it leads to"
        elif body := reply.decode("utf-8", "replace"):
            text += f": {self.shown(body)}"
        return self.hide_secrets(text)

    def hide_secrets(self, text: str) -> str:
        """Replaces the token and the query of the URL, which a server may echo, by `***`."""
        for secret in filter(None, (self.token, urlsplit(self.url).query)):
            text = text.replace(secret, "***")
        return text

    def shown(self, text: str) -> str:
        """A reply's text for a message: quoted, on one line, cut, without secrets."""
        text = " ".join(self.hide_secrets(text)[: 10 * SHOWN_CHARACTERS].split())
        return repr(shortened(text, SHOWN_CHARACTERS))

    def decode(self, reply: bytes, kind: type[T]) -> T:
        """A reply as a struct. Raises RequestError."""
        try:
            return msgspec.json.decode(reply, type=examined(kind))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            shown = self.shown(reply.decode("utf-8", "replace"))
            raise RequestError(
                f"{self.place}: unusable reply ({self.hide_secrets(error_text(error))}): {shown}"
            ) from None

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that wait for replies, :attr:`concurrency` of them."""
        return ThreadPoolExecutor(self.concurrency, REQUEST_THREADS)

    def run_all(
        self, tasks: list[Callable[[], T]], report: Callable[[int], None]
    ) -> tuple[dict[int, T], dict[int, RequestError]]:
        """Runs tasks of one request each in :attr:`pool`; see :meth:`results`."""
        return self.results([self.pool.submit(task) for task in tasks], report)

    def results(
        self, tasks: list[Future[T]], report: Callable[[int], None]
    ) -> tuple[dict[int, T], dict[int, RequestError]]:
        """Waits for tasks of one request each.

        Once :attr:`concurrency` tasks in a row have failed, the rest are not started: each would
        otherwise wait for the time limit if the service is down.

        Args:
            tasks: of :attr:`pool`. Each may raise RequestError; any other exception is raised here.
            report: called with the number of finished tasks, at least every
                :data:`REPORT_INTERVAL` seconds.

        Returns:
            Results and errors by the task's index. A task that was not begun is in neither.
        """
        results: dict[int, T] = {}
        errors: dict[int, RequestError] = {}
        in_a_row = 0
        running = {task: i for i, task in enumerate(tasks)}
        try:
            while running:
                finished, _ = wait(running, REPORT_INTERVAL, return_when=FIRST_COMPLETED)
                for future in finished:
                    index = running.pop(future)
                    try:
                        results[index], in_a_row = future.result(), 0
                    except RequestError as error:
                        errors[index], in_a_row = error, in_a_row + 1 if error.down else 0
                if in_a_row >= self.concurrency:
                    for future in [f for f in running if f.cancel()]:
                        del running[future]
                report(len(results))
        finally:
            for future in running:
                future.cancel()
        return results, errors


def read_token(config: HTTPConfig) -> str | None:
    """The token in the environment; None if none is configured.

    Raises:
        UserInputError: the variable is not set, or its value cannot be sent in a header. The value
            is not repeated.
    """
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise UserInputError(
            f"reward.http.token_env: the environment variable {config.token_env} is not set"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserInputError(
            f"reward.http.token_env: the value of {config.token_env} is not a token: it contains "
            "spaces or characters that no HTTP header can hold"
        )
    return token


class _TooLongError(Exception):
    """A reply is longer than :data:`MAX_REPLY`."""


class _Exchange:
    """One request and its reply, within the time limit."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        parts = urlsplit(endpoint.url)
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        options: dict[str, Any] = {"timeout": endpoint.timeout}
        if parts.scheme == "https":
            kind = http.client.HTTPSConnection
            options["context"] = endpoint.tls_context
        self._connection = kind(str(parts.hostname), parts.port, **options)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._socket: socket.socket | None = None
        self._expired = False

    def run(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of the reply."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers["Connection"] = "close"
        if self._endpoint.token is not None:
            headers["Authorization"] = f"Bearer {self._endpoint.token}"
        # A socket's own timeout restarts with each byte that arrives.
        timer = threading.Timer(self._endpoint.timeout, self._expire)
        timer.daemon = True
        timer.start()
        try:
            self._connection.connect()
            self._socket = self._connection.sock  # which getresponse() takes away
            if self._expired:
                raise TimeoutError
            self._connection.request("POST", self._target, body, headers)
            response = self._connection.getresponse()
            reply = response.read(MAX_REPLY + 1)
            if self._expired:
                raise TimeoutError
            if len(reply) > MAX_REPLY:
                raise _TooLongError(f"the reply is longer than {MAX_REPLY >> 20} MiB")
            if response.length:  # of a known length, what has not come
                raise http.client.IncompleteRead(b"", response.length)
            return response.status, response.headers, reply
        finally:
            timer.cancel()
            self._connection.close()

    def _expire(self) -> None:
        self._expired = True
        sock = self._socket or self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                # Not SSLSocket's own method, which takes the session away from the reading thread.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def reason(self, error: BaseException) -> str:
        """Describes an error on one line."""
        if self._expired or isinstance(error, TimeoutError):
            return f"no whole reply within {self._endpoint.timeout:g} s"
        if isinstance(error, _TooLongError):
            return str(error)
        if isinstance(error, socket.gaierror):
            return f"the host is unknown ({error.strerror})"
        if isinstance(error, ssl.SSLError):
            return tls_problem(error)
        if isinstance(error, http.client.IncompleteRead):
            return "the connection was closed in the middle of the reply"
        text = error.strerror if isinstance(error, OSError) and error.strerror else ""
        text = text or " ".join(error_text(error).split())[:SHOWN_CHARACTERS]
        return (text or type(error).__name__) + https_hint(error, self._endpoint.url)


def _retry_after(headers: http.client.HTTPMessage) -> float:
    """Seconds of the header Retry-After; 0 without one, or if it is a date."""
    value = (headers.get("Retry-After") or "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) < 7 else 0.0
