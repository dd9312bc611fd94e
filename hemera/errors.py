"""The exceptions of HEMERA.

A message reads *subject: fact; remedy*, with the bound where there is one:
``17_HE.tif: no resolution in the file; give he_mpp in the sheet``.
"""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell: 128 and the number of the signal."""


class HemeraError(Exception):
    """The base class of HEMERA's errors: shown to users as one line, without a traceback."""


class ConfigError(HemeraError):
    """An invalid key, type or value of the configuration."""


class SheetError(HemeraError):
    """A sheet of pairs that cannot be used; the message lists every fault of the sheet."""


class LeakageError(HemeraError):
    """A case or a source image that is in two splits."""


class SlideError(HemeraError):
    """An image or a slide that cannot be opened or read, or without resolution."""


class InputFileError(HemeraError):
    """An input file that is missing, was lost while it was read, or has changed since `describe`.

    Not a fault of its content, so no verdict: the job fails, and can be repeated.
    """


class RegistrationError(HemeraError):
    """A registration that failed."""


class ShardError(HemeraError):
    """A shard that is truncated, of another run, or lacks a member."""


class TableError(HemeraError):
    """A table that lacks columns, or whose types differ from its schema."""


class EngineError(HemeraError):
    """A mask engine whose model or settings do not allow it to run."""


class TrainingError(HemeraError):
    """A training run that cannot start, resume or continue."""
