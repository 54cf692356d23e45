"""Why a TLS connection failed, for messages."""

import http.client
import os
import ssl
from urllib.parse import urlsplit

NOT_YET_VALID, EXPIRED = 9, 10
UNTRUSTED = (2, 18, 19, 20, 21)
WRONG_NAME = (62, 64)
"""OpenSSL's results of the verification of a certificate (X509_V_ERR_…). Those of an untrusted one:
its issuer is not known, or it is self-signed; those of a wrong name: of a host, of an address."""
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
"""OpenSSL's reasons if the first bytes of the server are no TLS; which one depends on its
version."""

TLS_ALERT = "\x15\x03"
"""The first bytes of a TLS alert."""


def tls_problem(error: ssl.SSLError) -> str:
    """The cause and the remedy, on one line, without the URL."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its TLS certificate is refused: {_certificate_problem(error)}"
    if error.reason in NOT_TLS:
        return "no TLS is spoken on this port; if it is one of plain HTTP, its URL begins http://"
    if isinstance(error, ssl.SSLEOFError):
        return "the server ended the connection during TLS (does it expect http?)"
    return f"TLS failed ({error.reason or type(error).__name__})"


def https_hint(error: object, url: str) -> str:
    """A question to end the message of a failed request with; "" if TLS cannot be the reason.

    A server that expects TLS ends a connection of plain HTTP without a reply, or with an alert of
    TLS in the place of one.
    """
    alert = isinstance(error, http.client.BadStatusLine) and str(error).startswith(TLS_ALERT)
    ended = isinstance(error, ConnectionResetError | BrokenPipeError)
    if urlsplit(url).scheme == "http" and (ended or alert):
        return " (does the server expect https?)"
    return ""


def _certificate_problem(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == EXPIRED:
        return "it has expired and must be renewed (or this machine's clock is wrong)"
    if code == NOT_YET_VALID:
        return "it is not valid yet (or this machine's clock is wrong)"
    if code in WRONG_NAME:
        return "it is for another host name; the URL needs one that the certificate has"
    if code not in UNTRUSTED:
        return error.verify_message
    text = "it is self-signed, or of an authority that this machine does not know"
    path = os.environ.get("SSL_CERT_FILE")
    if path and not os.access(path, os.R_OK):  # OpenSSL ignores it without a word
        return f"{text}, and the file of SSL_CERT_FILE cannot be read: {path}"
    return f"{text}; start the run with SSL_CERT_FILE=FILE, a PEM file of what to trust"
