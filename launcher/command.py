"""What every command of ours does at its beginning and end: its three streams, and an exit code whatever happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final

from falcon_dist.contract import EXIT_FAILED, EXIT_USER_ERROR
from launcher.errors import Interruption, LaunchError, UserError

STREAMS: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
EXIT_INTERRUPTED: Final = 130


def run(name: str, work: Callable[[], int]) -> int:
    """The exit code of a command; what went wrong is said in a line that begins with its name."""
    _open_missing()
    try:
        code = _code_of(work)
        sys.stdout.flush()
    except (UserError, LaunchError) as fault:
        sys.stderr.write(f"{name}: {fault}\n")
        return EXIT_USER_ERROR if isinstance(fault, UserError) else EXIT_FAILED
    except Interruption as asked:
        from launcher.interrupts import cause_of

        return cause_of(asked.signal).exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who read the output has what it wanted
        _leave_output()
        return EXIT_FAILED
    except OSError as fault:
        _leave_output()
        where = "" if fault.filename is None else f': "{fault.filename}"'
        sys.stderr.write(f"{name}: {fault.strerror or fault}{where}\n")
        return EXIT_FAILED
    return code


def _code_of(work: Callable[[], int]) -> int:
    """Also where argparse leaves by itself: what --help has written is yet to be flushed."""
    try:
        return work()
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        return left.code or 0


def _open_missing() -> None:
    """Streams that whoever started the command has closed lead nowhere, and their numbers are nobody else's."""
    for number, (name, mode) in enumerate(STREAMS):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115, PTH123  # for as long as the process lives
            setattr(sys, name, stream)
            if stream.fileno() == number:
                os.set_inheritable(number, True)


def _leave_output() -> None:
    """What is still held back for a reader that is gone would fail once more when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
