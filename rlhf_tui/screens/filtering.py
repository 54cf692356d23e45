"""What is typed to filter the answers."""

import re

import msgspec

from engine.answers import SampleQuery
from engine.labels import LABELS
from rlhf_tui.widgets.lines import Row

LABEL_WORDS = {"judged": True, "unjudged": False}
_QUOTED = re.compile(r'"([^"]*)"')
_BOUND = re.compile(r"(score|kl)\s*(>=|<=|>|<)\s*(-?[0-9.]+(?:e-?[0-9]+)?)", re.IGNORECASE)
HINT: list[Row] = [
    [("words in prompt or answer, and any of", "dim")],
    [("score>1  score<-1  kl>8  kl<2  cut", "key")],
    [("good  bad  hack  judged  unjudged", "key"), ('   "good" is the word', "dim")],
]


def parse_filter(text: str, query: SampleQuery) -> SampleQuery:
    """`score>1 kl<8 cut good words`: bounds, what answers are, and words to be found.

    In quotes words are but words: `"good"` is one to be found.
    """
    quoted = [words for words in _QUOTED.findall(text) if words]
    text = _QUOTED.sub(" ", text)
    bounds: dict[str, float | None] = dict.fromkeys(("score_from", "score_to", "kl_from", "kl_to"))
    for name, sign, number in _BOUND.findall(text):
        try:
            bounds[f"{name.lower()}_{'from' if '>' in sign else 'to'}"] = float(number)
        except ValueError:
            continue
    words = _BOUND.sub(" ", text).split()
    ours = ("cut", *LABELS, *LABEL_WORDS)
    return msgspec.structs.replace(
        query,
        text=" ".join([*quoted, *(w for w in words if w not in ours)]),
        cut_off="cut" in words,
        labels=" ".join(label for label in LABELS if label in words),
        judged=next((LABEL_WORDS[w] for w in words if w in LABEL_WORDS), None),
        **bounds,
    )
