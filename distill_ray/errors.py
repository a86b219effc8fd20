"""Every error a user can meet, with the exit code the command line gives it.

A message states the fact, the numbers and the remedy. The command line prints it alone; only an error that is
not of ours keeps its traceback.
"""


class DistillError(Exception):
    """Base of the project's own errors; exit code 1."""

    exit_code = 1


class UserError(DistillError):
    """The recipe, the input or the environment is wrong and the user can mend it; exit code 2."""

    exit_code = 2


class IntegrityError(DistillError):
    """Stored bytes are truncated, altered, or belong to another identity; nothing of them was used."""


class LeaseHeldError(UserError):
    """Another live driver owns the run."""


class LeaseLostError(DistillError):
    """This driver's lease was taken over; it may publish nothing more."""


class CannotCaptureError(UserError):
    """The engine cannot give what the recipe asks for (say, exact temperatures); nothing stands in for it."""


class BudgetSpentError(UserError):
    """`capture.max_gpu_hours` is spent; all finished work is kept, and a larger budget goes on from there."""


class StoppedError(DistillError):
    """A stop was asked for (Ctrl-C, SIGTERM); all finished work is kept. Exit code 130."""

    exit_code = 130
