"""An agent as a task of srun: ``python -m launcher.branch``. Stands between what srun has for all and one agent."""

from __future__ import annotations

import os
import selectors
import signal
import sys
from typing import Final

from launcher import agent, frames
from launcher.wire import Lines

NODE: Final = "SLURMD_NODENAME"
ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def main() -> None:
    """Runs an agent and passes on what is for it and what it says, until it has ended."""
    host = os.environ.get(NODE)
    if host is None:
        sys.exit(f"launcher.branch: started by srun only, which sets {NODE}")
    to_agent, from_launcher = os.pipe(), 0
    from_agent = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(to_agent[0], 0)
        os.dup2(from_agent[1], 1)
        for fd in (*to_agent, *from_agent):
            os.close(fd)
        agent.main()
    os.close(to_agent[0])
    os.close(from_agent[1])
    for number in ENDING:
        signal.signal(number, lambda got, _: os.kill(child, got))
    _relay(host, from_launcher, to_agent[1], from_agent[0])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    code = code if code >= 0 else 128 - code
    told = _write(1, frames.up_end(host, code))
    # A code that is not 0 makes srun end all other tasks, in which ranks may be saving what was trained.
    agent.leave(0 if told else code)


def _relay(host: str, from_launcher: int, to_agent: int, from_agent: int) -> None:
    """Until the agent says no more. Waiting for a slow reader is right here: the agent counts what it has unsent."""
    down, up = Lines(from_launcher), Lines(from_agent)
    with selectors.DefaultSelector() as selector:
        selector.register(from_launcher, selectors.EVENT_READ)
        selector.register(from_agent, selectors.EVENT_READ)
        listening = True
        while not up.ended:
            ready = {key.fd for key, _ in selector.select()}
            if from_agent in ready:
                for line in up.read():
                    _write(1, b"".join(frames.up(host, line)))
                if up.held:
                    _write(1, frames.up_held(host))
            if from_launcher in ready and not _pass_down(host, down, to_agent):
                selector.unregister(from_launcher)
                listening = False
                os.close(to_agent)
        if listening:
            os.close(to_agent)


def _pass_down(host: str, down: Lines, to_agent: int) -> bool:
    """Passes on what is there; False: the agent's input is over."""
    for frame in down.read():
        line = frames.taken(host, frame)
        if line == b"":
            return False
        if line is not None and not _write(to_agent, line + b"\n"):
            return False
    return not down.ended


def _write(fd: int, data: bytes) -> bool:
    """Writes all of it; False: nobody reads any more."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


if __name__ == "__main__":
    main()
