"""An HTTP service on this machine that scores responses, and fails as a test tells it to."""

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Handler = BaseHTTPRequestHandler
Behaviour = Callable[[Handler, Any], None]
"""Answers one request, given its decoded body."""


def reply(data: Any, status: int = 200, **headers: str) -> Behaviour:
    """Always the same reply: JSON, or bytes as they are."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()

    def behave(handler: Handler, _request: Any) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def lengths(handler: Handler, request: Any) -> None:
    """Scores each response by its number of characters."""
    reply({"scores": [len(text) for text in request["responses"]]})(handler, request)


class RewardService:
    """Listens from its creation to :meth:`stop`; can be started again on the same port."""

    def __init__(self, behaviour: Behaviour = lengths, certificate: Path | None = None) -> None:
        """Starts to listen, with TLS if there is a PEM file of a key and its certificate."""
        self.behaviour = behaviour
        self._certificate = certificate
        self.next: list[Behaviour] = []
        """For the next requests, one each; then `behaviour` again."""
        self.requests: list[Any] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    def start(self) -> None:
        service = self

        class Answering(Handler):
            def do_POST(self) -> None:  # noqa: N802 - the base class calls it by this name
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with service.lock:
                    service.requests.append(json.loads(body))
                    service.headers.append(self.headers)
                    service.paths.append(self.path)
                    behaviour = service.next.pop(0) if service.next else service.behaviour
                try:
                    behaviour(self, json.loads(body))
                except OSError:  # the client has given up
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Answering)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        if self._certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self._certificate)
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
