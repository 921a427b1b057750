"""The error of a command line that cannot be right, whatever the files hold."""


class WrongUsage(ValueError):
    """Arguments are missing or do not go together: the exit code is 2, as after an unknown option."""
