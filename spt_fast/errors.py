"""The errors spt-fast raises on purpose.

Everything derives from :class:`SptFastError`, so ``except SptFastError`` catches every mistake of the caller and none
of ours, and from the builtin that fits, so ``except ValueError`` works too. A message is one sentence that names the
argument, what came and what was expected.
"""


class SptFastError(Exception):
    """Base of all errors that spt-fast raises on purpose."""


class InputError(SptFastError, ValueError):
    """An argument or the data itself is not what was asked for."""


class MissingFileError(SptFastError, FileNotFoundError):
    """A path that should exist does not."""


class CheckpointError(InputError):
    """A file of weights cannot be read, or does not hold what was expected."""


class UnsupportedModelError(InputError):
    """A model that cannot be prompted, or a backend that cannot run here; the message says why."""


class DivergedError(InputError):
    """Training went wrong for good: its loss is no longer finite."""


class AdapterMismatchError(InputError):
    """An adapter was trained on a different backbone; the message names the difference."""
