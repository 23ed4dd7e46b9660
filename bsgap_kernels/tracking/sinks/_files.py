"""Files that sinks write to: which paths are meant, and one writer a file."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any, Protocol

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_URI = re.compile(r"file:|[A-Za-z][A-Za-z0-9+.\-]+:/")


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def local_path(path: str | Path) -> Path:
    """The path with the home directory in the place of `~`.

    Raises:
        ValueError: a URI, which would become a folder of that name.
    """
    if _URI.match(str(path)):
        raise ValueError(f"path: got the URI {str(path)!r}, expected a path of this machine's file system")
    return Path(path).expanduser()


def lock(file: _HasDescriptor, path: Path) -> None:
    """Keep any other sink, of this or another process, from writing to an open file while it is open.

    Does nothing on Windows and on a file system without locks.

    Raises:
        BlockingIOError: another has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks
        raise BlockingIOError(
            f"path: {path} is being written to by another sink or process; name another file, or end that one"
        ) from None
