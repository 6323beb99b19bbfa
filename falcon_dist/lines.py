"""Lines at the end of files that grow while a run trains: each is there whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from io import FileIO
from typing import Final

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a disk says that may take more later: no reason to end a run."""


def append(file: FileIO, line: str) -> str | None:
    """Writes a line at the end of an unbuffered file that nobody else writes to; why there is no room, or None.

    Raises:
        OSError: the file cannot be written for another reason.
    """
    data, end = line.encode(), os.fstat(file.fileno()).st_size
    try:
        if file.write(data) == len(data):
            return None
        reason = os.strerror(errno.ENOSPC)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        reason = os.strerror(error.errno)
    with suppress(OSError):
        os.ftruncate(file.fileno(), end)
    return reason
