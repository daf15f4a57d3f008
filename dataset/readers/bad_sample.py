"""The errors of a sample that cannot be used, and how data is quoted in their messages."""

LONGEST_REASON = 500  # characters of a message; a name can be as long as the file


class BadSample(Exception):
    """A row or an image that cannot be used: where it stands, and what is wrong with it."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it can be pickled by a loader's worker
        self.where, self.reason = where, printable(reason)

    def __str__(self):
        return f"{self.where}: {self.reason}"


class MissingImage(BadSample):
    """The row is sound, but the file that it names is not there."""


def printable(text: str) -> str:
    """Data that is quoted in a message must not steer the terminal, break the line, hold half a
    character (no file could take it) or fill the screen."""
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON - 100] + " ... " + text[-95:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value) -> str:
    """A value that is not what it should be, for a message: its beginning, in quotes."""
    try:
        return repr(str(value)[:60])
    except RecursionError:
        return "lists nested too deeply"
