"""Divides a request among engines, and into several so that no message is over the limit.

The responses do not depend on each other: each row has its own uniform numbers.
"""

import math
from itertools import pairwise

from msgspec.structs import replace

from engine.protocol.frames import MAX_FRAME
from engine.protocol.rollout.messages import Generate, Generated

BUDGET = MAX_FRAME - 64 * 1024
"""Bytes of all rows of a message; the rest is for what does not grow with them."""


def divide(request: Generate, engines: int) -> list[Generate]:
    """Divides the rows of a request among engines.

    Responses to one prompt are adjacent rows, so all but a few prompts are processed, and cached,
    by one engine alone. The division depends on the number of rows and of engines only.

    Args:
        request: n prompts.
        engines: how many there are.

    Returns:
        A request for each engine, in the order of the rows. Their numbers of rows differ by one at
        most; with fewer rows than engines some have none.
    """
    n = len(request.prompts)
    cuts = [n * i // engines for i in range(engines + 1)]
    return [rows(request, a, b) for a, b in pairwise(cuts)]


def split(request: Generate, budget: int = BUDGET) -> list[Generate]:
    """Divides a request so that it and the replies to it have at most so many bytes for their rows.

    Args:
        request: n prompts.
        budget: bytes. A single row that needs more is a request of its own.

    Returns:
        Requests of about the same number of rows, in the order of the rows; at least one.
    """
    width, n = request.max_new_tokens, len(request.prompts)
    # A row of Generated is 12 bytes a token, one of Generate 8, one of Progress up to 5, as is each
    # token of a prompt.
    row = 12 * width + 5 * max(map(len, request.prompts), default=0) + 16
    pieces = max(1, math.ceil(n / max(1, budget // row)))
    size = max(1, math.ceil(n / pieces))
    return [rows(request, at, at + size) for at in range(0, max(1, n), size)]


def rows(request: Generate, start: int, stop: int) -> Generate:
    """A request for some of the rows of another one."""
    width = 8 * request.max_new_tokens
    return replace(
        request,
        prompts=request.prompts[start:stop],
        uniforms=request.uniforms[width * start : width * stop],
    )


def join(replies: list[Generated]) -> Generated:
    """The reply to a request whose parts got these, in order; all of the same weights.

    `seconds` is their sum.
    """
    return Generated(
        weights_version=replies[0].weights_version,
        lengths=[length for reply in replies for length in reply.lengths],
        ids=b"".join(reply.ids for reply in replies),
        logprobs=b"".join(reply.logprobs for reply in replies),
        entropies=b"".join(reply.entropies for reply in replies),
        seconds=sum(reply.seconds for reply in replies),
    )
