"""Process 1 of a namespace host: mounts what is its own, starts sshd, and collects whatever ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def mount(*words: str) -> None:
    subprocess.run(["/usr/bin/mount", *words], check=True)


def main(name: str, own: Path, shared: Path) -> None:
    socket.sethostname(name)
    mount("-t", "proc", "proc", "/proc")
    # This network's own sysfs, with the machine's cgroups back in it.
    mount("--rbind", "/sys/fs/cgroup", str(own / "cgroup"))
    mount("-t", "sysfs", "sysfs", "/sys")
    mount("--rbind", str(own / "cgroup"), "/sys/fs/cgroup")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    Path("/run/sshd").mkdir()
    mount("--bind", str(own / "disk"), str(shared / "disk"))
    mount("--bind", str(shared / "hosts"), "/etc/hosts")
    mount("--bind", str(shared / "client"), "/etc/ssh/ssh_config.d")
    subprocess.run(["/usr/sbin/sshd", "-f", str(shared / "sshd_config"), "-E", str(own / "sshd.log")], check=True)
    (own / "ready").touch()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            sys.exit("sshd is gone")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
