"""Process 1 of a node's container: makes the keys all containers share, if it is the first, and becomes sshd."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

KEYS = Path("/ssh")


def make_keys(folder: Path) -> None:
    """A key to log in with and one to know a host by; they live as long as the volume does."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "known_hosts").exists():
            return
        for name in ("id", "hostkey"):
            (folder / name).unlink(missing_ok=True)
            words = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "falcon", "-f", str(folder / name))
            subprocess.run(words, check=True)
        key = " ".join((folder / "hostkey.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text(f"[node*]:2222 {key}\n")


if __name__ == "__main__":
    make_keys(KEYS)
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/falcon/sshd_config"])  # noqa: S606  # as process 1, which the container ends with
