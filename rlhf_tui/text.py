"""The one gate for text that is not ours: model output, prompts, names, errors, log lines.

A terminal obeys what it is sent. :func:`sanitise` turns everything it could obey into visible
symbols; nothing untrusted is printed or drawn without it.
"""

import re

# Whole sequences first, so that what they carry does not stay behind as text. Unfinished ones end
# where the text does; ESC alone, or before anything else, is caught by the control characters.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|\Z)"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]+[0-~]",  # escapes with intermediates: character sets and the like
    re.DOTALL,
)
_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SYMBOLS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), "\ufffd")  # C1
    | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # lone surrogates cannot be encoded
    | dict.fromkeys(map(ord, _BIDI), "\ufffd")
    | {0x2028: "\u2424", 0x2029: "\u2424"}  # line and paragraph separators
)
ESCAPE_SYMBOL = "\u241b"


def sanitise(text: str) -> str:
    """The text with nothing left that a terminal obeys, but newlines and tabs."""
    return _SEQUENCE.sub(ESCAPE_SYMBOL, text).translate(_SYMBOLS)


def one_line(text: str, width: int | None = None) -> str:
    """Sanitised, on one line, cut to `width` characters."""
    line = sanitise(text).replace("\n", "\u2424").replace("\t", " ")
    return line if width is None or len(line) <= width else line[: max(0, width - 1)] + "…"
