"""The errors that a user can fix. Each message has three parts: what, where, what to do.

    RcnnError
    ├── ConfigError      a setting has a value that cannot work
    ├── DataError        a file or a row of a data set is invalid
    ├── SourceError      a data set's origin is missing, unreachable or altered
    ├── TrainingError    training or tuning cannot continue
    └── ClusterError     Ray, MLflow or the shared storage cannot be reached

The command line prints them without a traceback and exits with 2. Any other exception is a bug in rcnn and keeps its
traceback.
"""

from rcnn.text import printable


class RcnnError(Exception):
    """What went wrong, where, and what to do about it, in one line.

    Args:
        what: the fault, with the value that was found.
        where: the file, row or setting at fault.
        remedy: what the user can do next.
        retryable: whether the same call can succeed later, e.g. after a network failure.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "", retryable: bool = False):
        self.what, self.where, self.remedy, self.retryable = what, where, remedy, retryable
        super().__init__(what, where, remedy, retryable)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return printable(f"{head}. {self.remedy}" if self.remedy else head)  # a file name can contain a newline

    def __reduce__(self) -> tuple:
        # Ray and Prefect pickle errors to send them between processes, and pickle cannot pass keyword-only arguments.
        return _rebuild, (type(self), self.what, self.where, self.remedy, self.retryable)


def _rebuild(kind: type[RcnnError], what: str, where: str, remedy: str, retryable: bool) -> RcnnError:
    return kind(what, where=where, remedy=remedy, retryable=retryable)


class ConfigError(RcnnError):
    """A setting has a value that cannot work."""


class DataError(RcnnError):
    """A file or a row of a data set is invalid."""


class SourceError(RcnnError):
    """A data set's origin is missing, unreachable or altered."""


class TrainingError(RcnnError):
    """Training or tuning cannot continue."""


class Diverged(TrainingError):
    """The loss is no longer a number."""


class ClusterError(RcnnError):
    """Ray, MLflow or the shared storage cannot be reached."""


class LeaseLost(ClusterError):
    """Another process has taken over the work of this one."""
