"""Errors that are the user's to mend: printed as one line, exit status 1, no traceback."""


class UserError(Exception):
    """One clear line for the person at the terminal: what is wrong, where, and what to do about it."""


class DataError(UserError):
    """A data file or folder that is missing, damaged, empty, or not what it should be."""


class StartAgain(UserError):
    """The process must end, and the same command start again, to go on: `STATUS` is its exit status."""

    STATUS = 75
