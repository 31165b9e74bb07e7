"""Errors that a user can act on. Each says what was found, where, what was expected, and what to do.

`cli/app.py` prints the message as one paragraph and leaves with `exit_code` (the table is in docs/cli.md).
"""


class RewardTuneError(Exception):
    """Root of every error raised for users."""

    exit_code = 2


class RecipeError(RewardTuneError, ValueError):
    """A recipe, an override or the command line is wrong."""

    exit_code = 2


class PluginError(RewardTuneError, ImportError):
    """A reward or pipeline plug-in cannot be found, does not load, or does not do what its contract says."""

    exit_code = 2


class MissingExtra(RewardTuneError, ImportError):
    """An optional dependency is not installed; the message names the pip extra."""

    exit_code = 2


class DataError(RewardTuneError, ValueError):
    """Prompts, images or preference records are wrong."""

    exit_code = 3


class NonFiniteError(RewardTuneError, ArithmeticError):
    """Losses, gradients or rewards were not finite more often than allowed."""

    exit_code = 4


class OutOfMemoryError(RewardTuneError, MemoryError):
    """The device ran out of memory."""

    exit_code = 5


class DiskError(RewardTuneError, OSError):
    """Nothing more could be written."""

    exit_code = 6


class CheckFailed(RewardTuneError):
    """A check ran and its answer is no (`doctor`, `rewards test`, `compare --fail-under`, `export`)."""

    exit_code = 1
