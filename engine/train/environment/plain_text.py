"""Text of the user's code, as it can be sent to the other ranks and tokenised."""


def plain_text(text: str) -> str:
    """Returns a text without a subclass.

    Raises:
        UnicodeError: it has characters that no text has, such as half of a surrogate pair.
    """
    text.encode()
    return str.__str__(text)
