"""Parses the filter of the samples."""

import contextlib
import re

import msgspec

from engine.journal.labels import LABELS
from engine.journal.samples import SampleQuery
from rlhf_tui.widgets.lines import Row

LABEL_WORDS = {"judged": True, "unjudged": False}
_PART = re.compile(
    r'"(?P<quoted>[^"]*)"'
    r"|(?P<name>score|kl)\s*(?P<sign>>=|<=|>|<)\s*(?P<number>-?[0-9.]+(?:e-?[0-9]+)?)"
    r'|(?P<word>(?:(?!(?:score|kl)\s*[<>]=?\s*-?[0-9.])[^\s"])+)',
    re.IGNORECASE,
)
HINT: list[Row] = [
    [("words in prompt or response, and any of", "dim")],
    [("score>1  score<-1  kl>8  kl<2  cut", "key")],
    [("good  bad  hack  judged  unjudged", "key"), ('   "good" searches for the word', "dim")],
]


def parse_filter(text: str, query: SampleQuery) -> SampleQuery:
    """Parses `score>1 kl<8 cut good words`: bounds, properties, labels and words to search for.

    Quoted words are always searched for: `"good"` is not a label.
    """
    bounds: dict[str, float | None] = dict.fromkeys(("score_from", "score_to", "kl_from", "kl_to"))
    found: list[str] = []
    keywords: list[str] = []
    for part in _PART.finditer(text):
        if part["name"]:
            end = "from" if ">" in part["sign"] else "to"
            with contextlib.suppress(ValueError):
                bounds[f"{part['name'].lower()}_{end}"] = float(part["number"])
        elif (word := part["word"]) in ("cut", *LABELS, *LABEL_WORDS):
            keywords.append(word)
        elif words := word or part["quoted"]:
            found.append(words)
    return msgspec.structs.replace(
        query,
        text=" ".join(found),
        cut_off="cut" in keywords,
        labels=" ".join(label for label in LABELS if label in keywords),
        judged=next((LABEL_WORDS[w] for w in keywords if w in LABEL_WORDS), None),
        **bounds,
    )
