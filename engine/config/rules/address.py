"""The addresses at which machines reach each other."""

from engine.errors import ConfigError


def check_address(text: str) -> tuple[str, int]:
    """Splits `HOST:PORT` into host and port. Raises ConfigError for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"'{text}' is not an address: write HOST:PORT, such as 10.0.0.1:29400")
    return host, int(port)
