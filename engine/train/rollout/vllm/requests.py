"""Divides a request among engines, and splits it so that no message exceeds the size limit.

Responses do not depend on each other, since each row has its own uniform numbers.
"""

import math
from itertools import pairwise

from msgspec.structs import replace

from engine.protocol.frames import MAX_FRAME
from engine.protocol.rollout.messages import Generate, Generated

BUDGET = MAX_FRAME - 64 * 1024
"""Most bytes for the rows of a message; the rest is for parts of constant size."""


def divide(request: Generate, engines: int) -> list[Generate]:
    """Divides the rows of a request among engines.

    Responses to one prompt are adjacent rows, so nearly every prompt is processed and cached by a
    single engine. The division depends only on the numbers of rows and engines.

    Args:
        request: n prompts.
        engines: how many there are.

    Returns:
        A request for each engine, in row order. Their numbers of rows differ by at most one; with
        fewer rows than engines, some are empty.
    """
    n = len(request.prompts)
    cuts = [n * i // engines for i in range(engines + 1)]
    return [rows(request, a, b) for a, b in pairwise(cuts)]


def split(request: Generate, budget: int = BUDGET) -> list[Generate]:
    """Splits a request so that the rows of each part and its reply fit into a number of bytes.

    Args:
        request: n prompts.
        budget: the number of bytes. A single row that needs more becomes a request of its own.

    Returns:
        At least one request, in row order, with about the same number of rows each.
    """
    width, n = request.max_new_tokens, len(request.prompts)
    # A row of Generated is 12 bytes a token, one of Generate 8, one of Progress up to 5, as is each
    # token of a prompt.
    row = 12 * width + 5 * max(map(len, request.prompts), default=0) + 16
    pieces = max(1, math.ceil(n / max(1, budget // row)))
    size = max(1, math.ceil(n / pieces))
    return [rows(request, at, at + size) for at in range(0, max(1, n), size)]


def rows(request: Generate, start: int, stop: int) -> Generate:
    """Returns a request for some of another request's rows."""
    width = 8 * request.max_new_tokens
    return replace(
        request,
        prompts=request.prompts[start:stop],
        limits=request.limits[start:stop],
        uniforms=request.uniforms[width * start : width * stop],
    )


def join(replies: list[Generated]) -> Generated:
    """Joins the replies to a request's parts, in order; all must have the same weights version.

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
