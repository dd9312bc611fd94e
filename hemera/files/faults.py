"""Errors of third-party libraries, turned into HEMERA's own.

A damaged file makes a decoder raise almost any class of exception. A lack of memory or a full or
unreachable disk is not a fault of the file, so it passes and the job can be retried.
"""

import contextlib
import errno
import re
from collections.abc import Iterator

from hemera.errors import HemeraError

TRANSIENT_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EDQUOT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENODEV,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ENOTCONN,
        errno.EPERM,
        errno.EREMOTEIO,
        errno.EROFS,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""Causes outside the file that is read or written."""


def brief(error: BaseException) -> str:
    """Return the message of an error on one line, or the name of its class, shortened.

    Addresses in memory are removed: they differ from run to run, and reasons are stored in tables.
    """
    message = re.sub(r"\s*<[^<>]* object at 0x[0-9a-f]+>", "", str(error))
    message = " ".join(message.split()) or type(error).__name__
    return message if len(message) <= 300 else message[:296].rsplit(" ", 1)[0] + " ..."


@contextlib.contextmanager
def translated(to: type[HemeraError], message: str) -> Iterator[None]:
    """Raise `to` in place of any exception that a library raises inside the block.

    ``{error}`` in the message is replaced by the library's message on one line. A `HemeraError` and
    transient errors pass unchanged. Put only calls of the library into the block: errors of this
    package would be translated too.
    """
    try:
        yield
    except (HemeraError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
            raise
        raise to(message.replace("{error}", brief(error))) from error
