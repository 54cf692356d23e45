"""Sanitising of untrusted text: model output, prompts, names, errors, log lines.

Terminals execute the control sequences that they receive. :func:`sanitise` replaces them by visible
symbols. All untrusted text that is printed or drawn must pass through it.
"""

import codecs
import io
import re
import sys

# Complete sequences are replaced first, so that their parameters do not remain as text. An
# unterminated string sequence extends to the end of the text. Any other ESC is a control character.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|\Z)"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]+[0-~]",  # escapes with intermediates, such as character sets
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
    """Text without control characters and sequences. Newlines and tabs are kept."""
    return _SEQUENCE.sub(ESCAPE_SYMBOL, text).translate(_SYMBOLS)


def with_symbols(text: str) -> str:
    """Text whose control characters are symbols, each by itself, so that positions stay the same.

    For text that can be edited. A line break is a symbol, too.
    """
    return text.replace("\n", "\u2424").translate(_SYMBOLS)


def one_line(text: str, width: int | None = None) -> str:
    """Sanitised text on one line, cut to `width` characters with an ellipsis."""
    line = sanitise(text).replace("\n", "\u2424").replace("\t", " ")
    return line if width is None or len(line) <= width else line[: max(0, width - 1)] + "…"


def escape_unencodable() -> None:
    r"""Makes stdout and stderr escape the characters that their encoding lacks: `\u2192`.

    In a locale such as en_US.ISO-8859-1 an arrow or a response in Japanese would otherwise fail.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")
