"""Errors that are the user's to mend: their base, and those that several rooms raise."""


class UserError(Exception):
    """An error whose message says what is wrong and what mends it; the command prints it without a traceback."""


class FetchError(UserError, ValueError):
    """A model that could not be had; the message says why and what mends it."""


class ChecksumError(FetchError):
    """What came is not what was announced; it is thrown away."""
