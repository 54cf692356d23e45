"""Divides a request to the rollout engine into several, so that no message is over the limit.

The responses do not depend on each other: each row has its own uniform numbers.
"""

import math

from engine.protocol.frames import MAX_FRAME
from engine.protocol.rollout_messages import Generate, Generated

BUDGET = MAX_FRAME - 64 * 1024
"""Bytes of all rows of a message; the rest is for what does not grow with them."""


def split(request: Generate, budget: int = BUDGET) -> list[Generate]:
    """Divides a request so that it and the replies to it have at most so many bytes for their rows.

    Args:
        request: n prompts.
        budget: bytes. A single row that needs more is a request of its own.

    Returns:
        Requests of about the same number of rows, in the order of the rows.
    """
    width, n = request.max_new_tokens, len(request.prompts)
    # A row of Generated is 12 bytes a token, one of Generate 8, one of Progress up to 5, as is each
    # token of a prompt.
    row = 12 * width + 5 * max(map(len, request.prompts)) + 16
    pieces = math.ceil(n / max(1, budget // row))
    size = math.ceil(n / pieces)
    return [
        Generate(
            weights_version=request.weights_version,
            prompts=request.prompts[at : at + size],
            uniforms=request.uniforms[8 * width * at : 8 * width * (at + size)],
            max_new_tokens=width,
            temperature=request.temperature,
            sampling=request.sampling,
            eos=request.eos,
            look=request.look,
        )
        for at in range(0, n, size)
    ]


def join(replies: list[Generated]) -> Generated:
    """The reply to a request whose parts got these, in order; all of the same weights."""
    return Generated(
        weights_version=replies[0].weights_version,
        lengths=[length for reply in replies for length in reply.lengths],
        ids=b"".join(reply.ids for reply in replies),
        logprobs=b"".join(reply.logprobs for reply in replies),
        entropies=b"".join(reply.entropies for reply in replies),
        seconds=sum(reply.seconds for reply in replies),
    )
