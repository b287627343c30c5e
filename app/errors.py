"""The exceptions a caller of prefloop may see.

PrefloopError
├── RecipeError      a recipe, an override or an option is wrong; every fault is listed at once
├── DataError        a file, a row or a snapshot cannot be used
├── ModelError       a model folder or artifact cannot be loaded, verified or trained
├── LedgerError      the ledger refuses a write or cannot be read
├── ServiceError     a running service (gateway, Ray) is missing, refuses or answers wrongly
├── TrainingError    a run stopped: no usable pairs, a non-finite loss, a failed self-check
│   ├── WorkersLost  workers died more often than allowed; the run continues from its last checkpoint
│   └── OutOfMemory  memory did not hold a micro-batch, and the run continues with smaller ones, or a benchmark's arm
└── Interrupted      the user stopped the command; what was acknowledged is still there

The command line prints the message without a traceback and leaves with ``exit_code``. A gate that holds is no error:
it is a verdict, and leaves with ``HOLD_EXIT_CODE``.
"""

from collections.abc import Iterator

HOLD_EXIT_CODE = 3


class PrefloopError(Exception):
    """Base of every error that prefloop raises on purpose; the message names the value, the place and the remedy."""

    exit_code = 1


class RecipeError(PrefloopError):
    """A recipe, an override or an option is wrong."""


class DataError(PrefloopError):
    """A file, a row or a snapshot cannot be used."""


class ModelError(PrefloopError):
    """A model folder or artifact cannot be loaded, verified or trained."""


class LedgerError(PrefloopError):
    """The ledger refuses a write or cannot be read."""


class ServiceError(PrefloopError):
    """A running service is missing, refuses or answers wrongly."""


class TrainingError(PrefloopError):
    """A training run stopped."""


class WorkersLost(TrainingError):  # noqa: N818
    """Workers died more often than allowed; the run can continue."""


class OutOfMemory(TrainingError):  # noqa: N818
    """Memory did not hold a worker's micro-batch, or an arm of a benchmark."""


class Interrupted(PrefloopError):  # noqa: N818
    """The user stopped the command."""

    exit_code = 130


def said(error: BaseException, line: int) -> str:
    """Return a line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[line]


def one_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first of what the tasks of a group raised where all of it is ours, else the group.

    Raise it from a plain `except`: what an `except*` raises is in a group again in Python 3.11.2, which Debian 12 has.
    """
    leaves = list(_leaves(errors))
    return leaves[0] if all(isinstance(leaf, PrefloopError) for leaf in leaves) else errors


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
