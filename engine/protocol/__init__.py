"""Communication between processes: frames, messages, commands and a client."""
