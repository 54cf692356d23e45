"""`notify.webhooks`: messages over HTTP, in the format of a chat service.

URLs and tokens are secrets. They come from environment variables that the configuration names, and
neither the log nor an error repeats them.
"""

import asyncio
import contextlib
import html
import http.client
import os
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec

from engine.config.sections.supervision import Webhook
from engine.errors import shortened
from engine.monitoring.channels.message import Notification, NotificationError, one_line
from engine.tls import https_hint, tls_problem

SOCKET_TIMEOUT = 10.0
"""Seconds for each operation on a connection. The time for a whole message is limited as well."""
TELEGRAM = "https://api.telegram.org"
MAX_TEXT = 1900
"""Characters of a text. Discord accepts 2000, the others more."""
MAX_REPLY = 300
"""Maximum number of bytes of an error reply that the log repeats."""
NTFY_PRIORITIES = {"info": "default", "warning": "high", "error": "urgent"}


@dataclass(frozen=True)
class Post:
    """One HTTP request with the method POST."""

    url: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class WebhookChannel:
    """Posts each notification to one webhook."""

    def __init__(
        self, webhook: Webhook, index: int, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Opens no connection.

        Args:
            webhook: its configuration.
            index: in `notify.webhooks`, for its name.
            environment: holds the secrets.
        """
        self._webhook = webhook
        self._environment = environment
        self._thread: threading.Thread | None = None
        self.name = f"notify.webhooks[{index}] ({webhook.format})"

    def missing_variables(self) -> list[str]:
        """The environment variables that its configuration names and that are not set."""
        named = (self._webhook.url_variable, self._webhook.token_variable)
        return [name for name in named if name is not None and not self._environment.get(name)]

    async def send(self, message: Notification) -> None:
        """Posts the message in a separate thread, which does not delay the end of the process.

        Raises:
            NotificationError: a variable is not set, the server cannot be reached or refuses, or
                the thread of an earlier message still waits for the server.
        """
        if missing := self.missing_variables():
            raise NotificationError(f"the environment variable {missing[0]} is not set")
        if self._thread is not None and self._thread.is_alive():
            raise NotificationError("the server still keeps an earlier message waiting")
        request = self._request(message)
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[str | None] = loop.create_future()

        def finish(problem: str | None) -> None:
            if not outcome.done():  # it is cancelled after the time limit
                outcome.set_result(problem)

        def work() -> None:
            problem = post(request)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(finish, problem)

        # A daemon, unlike the threads of asyncio, which the end of the process waits for.
        self._thread = threading.Thread(target=work, name=self.name, daemon=True)
        self._thread.start()
        if (problem := await outcome) is not None:
            raise NotificationError(self._without_secrets(problem))

    def _request(self, message: Notification) -> Post:
        url = self._environment.get(self._webhook.url_variable or "", TELEGRAM)
        token = self._environment.get(self._webhook.token_variable or "", "")
        return FORMATS[self._webhook.format](message, url, token, self._webhook)

    def _without_secrets(self, text: str) -> str:
        """Removes URL and token from a reply, in which a server may repeat them."""
        for name in (self._webhook.url_variable, self._webhook.token_variable):
            secret = self._environment.get(name or "", "")
            for part in (secret, urlsplit(secret).path):
                text = text.replace(part, "***") if len(part) > 1 else text
        return text


def _as_json(url: str, content: Any, token: str = "") -> Post:
    headers = {"Content-Type": "application/json"} | _authorization(token)
    return Post(url, msgspec.json.encode(content), headers)


def _authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def generic(message: Notification, url: str, token: str, _webhook: Webhook) -> Post:
    """The same JSON as `notify.command` gets, with the samples of an alert."""
    return _as_json(url, message.as_json(), token)


def slack(message: Notification, url: str, token: str, _webhook: Webhook) -> Post:
    """An incoming webhook of Slack or Mattermost. `<!channel>` and links in a text stay text."""
    return _as_json(url, {"text": html.escape(_text(message), quote=False)}, token)


def discord(message: Notification, url: str, token: str, _webhook: Webhook) -> Post:
    """A webhook of Discord; a text mentions nobody."""
    content = {"content": _text(message), "allowed_mentions": {"parse": []}}
    return _as_json(url, content, token)


def ntfy(message: Notification, url: str, token: str, _webhook: Webhook) -> Post:
    """A topic of ntfy. The title is in the query, because headers of HTTP are not UTF-8."""
    query = urlencode(
        {
            "title": f"{one_line(message.session)}: {message.kind}",
            "priority": NTFY_PRIORITIES[message.level],
        }
    )
    joint = "&" if urlsplit(url).query else "?"
    return Post(f"{url}{joint}{query}", _text(message).encode(), _authorization(token))


def telegram(message: Notification, url: str, token: str, webhook: Webhook) -> Post:
    """A bot of Telegram; without `parse_mode` the text has no markup."""
    content = {"chat_id": webhook.chat, "text": _text(message)}
    return _as_json(f"{url.rstrip('/')}/bot{token}/sendMessage", content)


FORMATS: dict[str, Callable[[Notification, str, str, Webhook], Post]] = {
    "json": generic,
    "slack": slack,
    "discord": discord,
    "ntfy": ntfy,
    "telegram": telegram,
}
"""`format` of a webhook → the request of a message, from the URL and the token."""


def _text(message: Notification) -> str:
    return shortened(message.title, MAX_TEXT)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirects: they become a GET without the message and may leak the token."""

    def redirect_request(self, *_args: Any) -> None:
        """Follows no redirect."""


def post(request: Post) -> str | None:
    """Sends a request; returns why it failed, or None. Blocks; uses the system's proxies."""
    if urlsplit(request.url).scheme not in ("http", "https"):
        return "its URL does not begin with http:// or https://"
    headers = {"User-Agent": "rlhf-tui"} | request.headers  # Discord refuses the one of urllib
    try:
        asked = urllib.request.Request(request.url, request.body, headers, method="POST")  # noqa: S310 - the scheme is checked
        with urllib.request.build_opener(_NoRedirect).open(asked, timeout=SOCKET_TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code} {_reply(error)}".strip()
    except urllib.error.URLError as error:
        return _reason(error.reason, request.url)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _reason(error, request.url)


def _reply(error: urllib.error.HTTPError) -> str:
    try:
        return one_line(error.read(MAX_REPLY).decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return ""


def _reason(error: object, url: str) -> str:
    """Why a connection failed. Texts of other exceptions are left out: they may hold the URL."""
    if isinstance(error, TimeoutError):
        return f"no reply within {SOCKET_TIMEOUT:.0f} s"
    if isinstance(error, socket.gaierror):
        return "the name of its host cannot be resolved"
    if isinstance(error, ssl.SSLError):
        return tls_problem(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + https_hint(error, url)
    return f"the connection failed ({type(error).__name__})" + https_hint(error, url)
