"""What an exception of measured code means for a record: outcome, reason and traceback."""

import traceback

from mambench.harness.spec import Outcome

REASON_LENGTH = 240
TRACEBACK_LENGTH = 4000
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def classify(error: BaseException) -> Outcome:
    """Return the outcome that an exception of an implementation means."""
    if isinstance(error, NotImplementedError):
        return Outcome.UNSUPPORTED
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return Outcome.OOM
    return Outcome.ERROR


def describe(error: BaseException) -> str:
    """Return one short line: the exception's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 1] + "…"


def trace(error: BaseException) -> str:
    """Return the end of an exception's traceback."""
    return "".join(traceback.format_exception(error))[-TRACEBACK_LENGTH:]
