"""Calls that may fail for a while: a storage out of reach, a disk that is full."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 120.0
LONGEST_PAUSE_S = 10.0
HOPELESS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_BUCKET", "NO_SUCH_KEY")
"""In errors of object stores that time does not mend."""


def patiently(call: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
    """`call()`, tried again after growing, random pauses while it raises an OSError that time may mend.

    Args:
        patience_s: seconds after which its error is raised.
    """

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            log.warning("%s: trying again for up to %g s", reason(state.outcome.exception()), patience_s)

    tries = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
        before_sleep=tell,
        reraise=True,
    )
    return tries(call)


def reason(error: BaseException | None) -> str:
    """An OSError in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _may_pass(error: BaseException) -> bool:
    never = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)
    return isinstance(error, OSError) and not isinstance(error, never) and not any(h in str(error) for h in HOPELESS)
