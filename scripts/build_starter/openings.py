"""The openings the starter policy continues, written by hand for this project.

They are neutral on purpose: the word that decides the sentiment is always left to the
policy, so that an RL run has room to move it either way.  Each one is two to six words
and has no trailing space; the first response token carries the space.
"""

from __future__ import annotations

from pathlib import Path


def _read(name: str) -> tuple[str, ...]:
    return tuple((Path(__file__).parent / name).read_text(encoding="utf-8").splitlines())


FILM_OPENINGS = _read("openings_film.txt")
PRODUCT_OPENINGS = _read("openings_product.txt")
OPENINGS = FILM_OPENINGS + PRODUCT_OPENINGS

# The shipped prompts: three in four of the openings; the policy has met the others too.
PROMPTS = tuple(o for k, o in enumerate(OPENINGS) if k % 4 != 3)
