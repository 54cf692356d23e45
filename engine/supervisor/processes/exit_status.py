"""Exit statuses of the processes in words."""

import signal


def describe_exit(status: int) -> str:
    """An exit status in words; torchrun's agent passes signal N on as 128 + N."""
    status = 128 - status if status > 128 else status
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = " (the kernel does this when memory runs out)" if status == -signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"ended with status {status}"
