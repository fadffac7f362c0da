"""The base of errors that are the user's to mend."""


class UserError(Exception):
    """An error whose message says what is wrong and what mends it; the command prints it without a traceback."""
