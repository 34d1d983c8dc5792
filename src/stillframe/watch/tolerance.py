"""How many saves of a family may fail in a row before it is no longer borne."""

from __future__ import annotations

from stillframe.policies import FailureAction, OnFailure


class Tolerance:
    """Counts the failures in a row of one family of saves, and says what each of them leads to."""

    def __init__(self, policy: OnFailure) -> None:
        self._policy = policy
        self._in_a_row = 0

    def failed(self) -> FailureAction:
        self._in_a_row += 1
        if self._policy.action == "continue" and self._in_a_row > self._policy.at_most:
            return "raise"
        return self._policy.action

    def succeeded(self) -> None:
        self._in_a_row = 0

    @property
    def account(self) -> str:
        """How far it is, in words, for the log."""
        return f"{self._in_a_row} in a row, of at most {self._policy.at_most}"
