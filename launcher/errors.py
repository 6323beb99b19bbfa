"""What the launcher raises on purpose.

BaseException
├── KeyboardInterrupt
│   └── Interruption                 a signal asked the launcher to end, while no attempt ran that could be stopped
Exception
├── falcon_dist.contract.UserError   what the user gave cannot be; one line, exit code 2
│   └── HostError                    a host is not as it has to be; after an attempt that ran, a failure like others
└── LaunchError                      a host or an agent failed before or beside the ranks; one line, exit code 1
"""

from __future__ import annotations

from falcon_dist.contract import UserError

__all__ = ["HostError", "Interruption", "LaunchError", "UserError"]


class Interruption(KeyboardInterrupt):
    """A signal asked the launcher to end: exit code 128 + signal."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


class HostError(UserError):
    """What a host is like does not fit what was asked for. Where it did before, the host has changed, not the wish."""

    def __init__(self, text: str, hosts: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.hosts = hosts
        """Hosts at fault, where that is known."""


class LaunchError(Exception):
    """A host or an agent did not do its part: shown as its one line, without a traceback, exit code 1."""

    def __init__(self, text: str, hosts: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.hosts = hosts
        """Hosts at fault, where that is known."""
