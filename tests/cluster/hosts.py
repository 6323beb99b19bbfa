"""Hosts made of Linux namespaces on one machine: each with its own network, processes, name, disk and a real sshd.

Needs root and the programs in ``NEEDED``. Nothing can leave: the hosts share a bridge in a namespace of its own and
have no route beyond it. All else of the file system is shared, as over NFS; each host sees a disk of its own at
``Hosts.disk``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from cluster.machine import PATHS, command, command_line, join, memory_group, wait_until

NEEDED = ("ip", "nft", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter", "setpriv", "mount")
INIT = Path(__file__).with_name("host_init.py")
SSHD = """
Port 22
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PermitUserEnvironment yes
UseDNS no
PidFile none
MaxStartups 200
"""
CLIENT = """
Host node* {network}.* {network6}*
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""


def missing() -> list[str]:
    """What this machine lacks for such hosts."""
    lacking = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:{PATHS}") is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


class Host:
    """One of them."""

    def __init__(self, hosts: Hosts, number: int) -> None:
        self.name = f"node{number}"
        self.address = f"{hosts.network}.{number}"
        self.address6 = f"{hosts.network6}{number}"
        self.folder = hosts.folder / self.name
        self.disk = self.folder / "disk"
        """What the host sees at ``Hosts.disk``, seen from outside."""
        self._hosts = hosts
        self.netns = f"{hosts.prefix}{number}"
        self._port = f"{hosts.prefix}p{number}"
        self._number = number
        self.init: int | None = None
        self._is_cut = False
        self.memory_group: Path | None = None
        """The cgroup that what runs here is in."""

    def boot(self) -> None:
        """Brings it up; returns when its sshd answers."""
        for folder in (self.disk, self.folder / "cgroup"):
            folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "ready").unlink(missing_ok=True)
        if not Path("/run/netns", self.netns).exists():  # it was off for a while
            self._plug()
        words = ["nsenter", f"--net=/run/netns/{self.netns}", "unshare", "--pid", "--fork", "--uts", "--ipc"]
        words += ["--mount", "--propagation", "private", sys.executable, "-I", str(INIT)]
        words += [self.name, str(self.folder), str(self._hosts.folder)]
        with (self.folder / "log").open("ab") as log:
            started = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._hosts.started.append(started)
        wait_until((self.folder / "ready").exists, what=f"{self.name}: see {self.folder}/log: ready")
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        self.init = int(children[0])

    def kill(self) -> None:
        """Every process there dies at once, as when the machine fails but the network still answers for it."""
        if self.init is not None:
            os.kill(self.init, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{self.init}").exists())
            self.init = None

    def reboot(self) -> None:
        """Brings a killed one up again, plugged in anew."""
        self.heal()  # the rules would take hold of the new device of this name too
        command("ip", "-n", self._hosts.switch, "link", "del", self._port)
        command("ip", "netns", "del", self.netns)
        self.boot()

    def seen(self, path: Path) -> Path:
        """A path of this host as it is seen from outside."""
        return Path(f"/proc/{self.init}/root{path}")

    @contextlib.contextmanager
    def mounted(self, *words: str) -> Iterator[None]:
        """Something mounted on this host only, given as to mount(8), the place last."""
        self._mount(*words)
        try:
            yield
        finally:
            self.unmount(Path(words[-1]))

    def remount(self, options: str, place: Path) -> None:
        """Changes options of what is mounted there."""
        self._mount("-o", f"remount,{options}", str(place))

    def unmount(self, place: Path) -> None:
        """Takes it away at once, whoever uses it."""
        self.run("umount", "--lazy", str(place))

    @contextlib.contextmanager
    def overlaid(self, place: Path, upper: Path) -> Iterator[None]:
        """A folder that has on top, on this host only, what is in ``upper``; nothing is written to either."""
        with self.mounted("-t", "overlay", "-o", f"lowerdir={upper}:{place}", "overlay", str(place)):
            yield

    @contextlib.contextmanager
    def login_environment(self, env: Mapping[str, str]) -> Iterator[None]:
        """Variables of whoever comes in over ssh."""
        folder = Path.home() / ".ssh"
        folder.mkdir(mode=0o700, exist_ok=True)
        with self.mounted("-t", "tmpfs", "-o", "mode=700", "tmpfs", str(folder)):
            self.seen(folder / "environment").write_text("".join(f"{k}={v}\n" for k, v in env.items()))
            yield

    def _mount(self, *words: str) -> None:
        done = self.run("mount", *words)
        assert done.returncode == 0, f"{self.name}: mount {words}: {done.stderr}"

    def cut(self) -> None:
        """The network loses every frame to and from it, silently."""
        rules = "".join(
            f'chain {side} {{ type filter hook {hook} device "{self._port}" priority 0; drop; }}\n'
            for side, hook in (("from", "ingress"), ("to", "egress"))
        )
        self._switch("nft", "-f", "-", input=f"table netdev {self._port} {{\n{rules}}}\n")
        self._is_cut = True

    def heal(self) -> None:
        """Undoes cut."""
        if self._is_cut:
            self._switch("nft", "delete", "table", "netdev", self._port)
            self._is_cut = False

    def enter(self, *words: str, cwd: Path | str = "/", **options: Any) -> subprocess.Popen[str]:
        """A process started on this host; it dies with the one that waits for it here."""
        entry = ["nsenter", "-t", str(self.init), "--net", "--pid", "--uts", "--ipc", "--mount", f"--wdns={cwd}", "--"]
        tied = ["setpriv", "--pdeathsig", "KILL", "--", *words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        joined = {} if self.memory_group is None else {"preexec_fn": partial(join, self.memory_group)}
        return subprocess.Popen([*entry, *tied], **{**pipes, **joined, **options})

    def run(self, *words: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command run on this host to its end."""
        process = self.enter(*words, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{self.name}: no end of {words}:\n{out}\n{err}") from None
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def pids(self) -> list[int]:
        """Processes of this host, by the numbers that the outside knows them by."""
        return [int(pid) for pid in command("ip", "netns", "pids", self.netns).split()]

    def find(self, *signs: str) -> list[int]:
        """Those of them whose command line has all the signs."""
        return [pid for pid in self.pids() if all(sign in command_line(pid) for sign in signs)]

    def listening(self) -> list[str]:
        """ "ADDRESS:PORT" of every TCP socket that listens here, but for the sshd's."""
        if self.init is None:
            return []
        told = command("ip", "netns", "exec", self.netns, "ss", "-Hltn").splitlines()
        places = [line.split()[3] for line in told if line.strip()]
        return [place for place in places if not place.endswith(":22")]

    def limit_memory(self, limit: int) -> None:
        """All its processes together get so many bytes (cgroup v1 or v2)."""
        self.memory_group = folder = memory_group() / f"{self._hosts.prefix}{self._number}"
        folder.mkdir()
        name = "memory.limit_in_bytes" if (folder / "memory.limit_in_bytes").exists() else "memory.max"
        (folder / name).write_text(str(limit))
        for pid in self.pids():
            (folder / "cgroup.procs").write_text(str(pid))

    def free_memory(self) -> None:
        """Undoes limit_memory."""
        folder, self.memory_group = self.memory_group, None
        if folder is None:
            return
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                (memory_group() / "cgroup.procs").write_text(pid)
        wait_until(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()

    def _plug(self) -> None:
        hosts, inside = self._hosts, self.netns
        command("ip", "netns", "add", inside)
        # A fixed hardware address: peers find it again at once when it was off.
        mac = f"02:00:00:00:00:{self._number:02x}"
        pair = ["type", "veth", "peer", "name", self._port, "netns", hosts.switch]
        command("ip", "-n", inside, "link", "add", "eth0", "address", mac, *pair)
        command("ip", "-n", inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        command("ip", "-n", inside, "addr", "add", f"{self.address6}/64", "dev", "eth0", "nodad")
        for name in ("lo", "eth0"):
            command("ip", "-n", inside, "link", "set", name, "up")
        command("ip", "-n", hosts.switch, "link", "set", self._port, "master", "br0", "up")

    def _switch(self, *words: str, **options: Any) -> None:
        command("ip", "netns", "exec", self._hosts.switch, *words, **options)


class Hosts:
    """node1, node2, ... for as long as the ``with`` block lasts."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        """Where each host sees a disk of its own."""
        self.prefix = f"f{os.getpid() % 100_000}n"
        self.switch = f"f{os.getpid() % 100_000}sw"
        self.network = f"10.{100 + os.getpid() % 100}.7"
        self.network6 = "fd00:7::"
        self.started: list[subprocess.Popen[bytes]] = []
        self.hosts = [Host(self, number) for number in range(1, count + 1)]

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __enter__(self) -> Self:
        lacking = missing()
        assert not lacking, f"these tests need {', '.join(lacking)}; see make test-cluster"
        try:
            self._write_settings()
            command("ip", "netns", "add", self.switch)
            command("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge", "stp_state", "0")
            command("ip", "-n", self.switch, "link", "set", "br0", "up")
            for host in self.hosts:
                host.boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        for process in self.started:
            process.wait(10)
        for name in (self.switch, *(f"{self.prefix}{number}" for number in range(1, len(self.hosts) + 1))):
            if Path("/run/netns", name).exists():
                command("ip", "netns", "del", name)
        for host in self.hosts:
            host.free_memory()

    def _write_settings(self) -> None:
        for name in ("client", "disk"):
            (self.folder / name).mkdir(parents=True)
        for key in ("id", "hostkey"):
            command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        names = [f"{host.address} {host.name}" for host in self.hosts]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        public = " ".join((self.folder / "hostkey.pub").read_text().split()[:2])
        (self.folder / "known_hosts").write_text(f"node*,{self.network}.*,{self.network6}* {public}\n")
        values = {"folder": self.folder, "network": self.network, "network6": self.network6}
        (self.folder / "sshd_config").write_text(SSHD.format(**values))
        (self.folder / "client" / "hosts.conf").write_text(CLIENT.format(**values))
