"""Why a run does not go into the store."""


class Excluded(Exception):
    """A rule that the user chose leaves the run out; not an error. The message is the reason."""


class Unusable(ValueError):
    """The run cannot be prepared: a file is missing, damaged or contradicts another; the message says it."""
