"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """A mistake that the user can mend; its message is one sentence that says what to do.

    `cli.py` prints the message without a traceback and ends with exit code 2.
    """


class Stopped(Exception):
    """The user or the system asked a run to stop; its work so far is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
