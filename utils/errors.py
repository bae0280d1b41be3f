"""What a user can cause, each with one line that names the file or key and the remedy.

``run.py`` turns every :class:`UserError` into that line on stderr and exit code 2; anything else is a bug
(traceback, exit code 1). A caller's mistake inside the code base is a ``ValueError``, ours is an ``assert``.
"""


class UserError(Exception):
    """Bad input, as one line: ``where: what; remedy``.

    ``UserError("confs/x.yaml", "no such file", "check the path")`` says
    ``confs/x.yaml: no such file; check the path``.

    Args:
        where: the file, folder or dotted config key at fault.
        what: what is wrong with it.
        remedy: what the user can do about it.
    """

    def __init__(self, where: object, what: str, remedy: str) -> None:
        super().__init__(" ".join(f"{where}: {what}; {remedy}".split()))


class ConfigError(UserError):
    """A config key is unknown, ill-typed or out of range."""


class DataError(UserError):
    """A capture is missing, unreadable or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, of another model or of a newer version, or cannot be written."""


class BackendError(UserError):
    """A backend or device that was asked for by name cannot run here."""


class ExportError(UserError):
    """A mesh, picture or video cannot be made or written."""


class TrainingError(UserError):
    """Training cannot go on: too many non-finite steps in a row."""
