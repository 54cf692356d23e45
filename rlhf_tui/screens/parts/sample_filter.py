"""Parses the filter of the samples."""

import contextlib
import re

import msgspec

from engine.journal.judgements.labels import LABELS
from engine.journal.samples import SampleQuery
from rlhf_tui.widgets.lines import Row

LABEL_WORDS = {"judged": True, "unjudged": False}
_PART = re.compile(
    r'"(?P<quoted>[^"]*)"'
    r"|(?P<name>score|kl)\s*(?P<sign>>=|<=|>|<)\s*(?P<number>-?[0-9.]+(?:e-?[0-9]+)?)"
    r'|(?P<word>(?:(?!(?:score|kl)\s*[<>]=?\s*-?[0-9.])[^\s"])+)',
    re.IGNORECASE,
)
_LIKE_A_CONDITION = re.compile(r"(?:score|kl|len|length|step)(?:[<>=].*)?", re.IGNORECASE)
_SIGN = re.compile(r"[<>]=?|=")
HINT: list[Row] = [
    [("words in prompt or response, and any of", "dim")],
    [("score>1  score<-1  kl>8  kl<2  cut", "key")],
    [("good  bad  hack  judged  unjudged", "key"), ('   "good" searches for the word', "dim")],
]


def check_filter(text: str) -> tuple[bool, str]:
    """Whether a filter can be used, and what is wrong with it.

    A condition that is not understood, such as `score>x`, would be searched for as words.
    """
    words = [part["word"] or "" for part in _PART.finditer(text)]
    for i, word in enumerate(words):
        found = _LIKE_A_CONDITION.fullmatch(word)
        following = words[i + 1] if i + 1 < len(words) else ""
        if found and (_SIGN.search(word) or _SIGN.match(following)):
            return False, (
                f"{word}: a condition is score or kl, > or <, and a number; "
                "words in quotes are searched for"
            )
    return True, ""


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


def keywords(query: SampleQuery) -> list[str]:
    """The keywords of a filter: words that are not searched for."""
    words = ["cut"] if query.cut_off else []
    words += query.labels.split()
    return words + [word for word, judged in LABEL_WORDS.items() if judged is query.judged]
