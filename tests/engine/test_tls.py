"""What is said if the TLS of a service on the network fails."""

import socket
import threading
from http.client import BadStatusLine, RemoteDisconnected
from pathlib import Path

import pytest

from engine.monitoring.channels import webhook
from engine.tls import https_hint
from tests.reward_service import RewardService, reply

DATA = Path(__file__).parent.parent / "data" / "tls"
TRUSTED, EXPIRED = DATA / "localhost.pem", DATA / "expired.pem"


def problem(certificate, host="localhost", scheme="https"):
    """What a message to a service with this certificate fails with."""
    service = RewardService(reply({}), certificate)
    try:
        return webhook.post(webhook.Post(f"{scheme}://{host}:{service.port}/", b"{}"))
    finally:
        service.stop()


@pytest.fixture(autouse=True)
def trust(monkeypatch):
    """Trusts the certificates of a file."""
    monkeypatch.setenv("no_proxy", "*")
    return lambda path: monkeypatch.setenv("SSL_CERT_FILE", str(path))


def test_a_certificate_that_the_environment_names_is_trusted(trust):
    trust(TRUSTED)
    assert problem(TRUSTED) is None


def test_an_unknown_certificate_is_refused_with_the_way_to_trust_it(monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert "start the run with SSL_CERT_FILE=FILE" in problem(TRUSTED)


def test_a_file_of_certificates_that_cannot_be_read_is_named(trust, tmp_path):
    trust(tmp_path / "missing.pem")
    assert problem(TRUSTED).endswith(f"cannot be read: {tmp_path / 'missing.pem'}")


def test_an_expired_certificate_must_be_renewed(trust):
    trust(EXPIRED)
    assert "it has expired and must be renewed" in problem(EXPIRED)


def test_a_certificate_of_another_host_name_is_refused(trust):
    trust(TRUSTED)
    assert "it is for another host name" in problem(TRUSTED, host="127.0.0.1")


def test_a_port_of_plain_http_speaks_no_tls():
    assert "its URL begins http://" in problem(None)


def test_a_server_that_ends_the_connection_instead_of_answering_may_expect_http():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def read_and_close():
            connection, _ = server.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=read_and_close)
        thread.start()
        port = server.getsockname()[1]
        found = webhook.post(webhook.Post(f"https://127.0.0.1:{port}/", b"{}"))
        thread.join()
    assert found.endswith("during TLS (does it expect http?)")


def test_a_port_of_tls_that_is_sent_plain_http_may_expect_https():
    assert problem(TRUSTED, scheme="http").endswith(" (does the server expect https?)")


@pytest.mark.parametrize(
    ("error", "url", "hint"),
    [
        (BadStatusLine("\x15\x03\x03\x00"), "http://box/", True),  # an alert of TLS
        (RemoteDisconnected(), "http://box/", True),
        (BadStatusLine("SSH-2.0"), "http://box/", False),
        (ConnectionRefusedError(), "http://box/", False),
        (ConnectionResetError(), "https://box/", False),
    ],
)
def test_https_is_asked_about_where_tls_can_be_the_reason(error, url, hint):
    assert bool(https_hint(error, url)) == hint
