"""Brings what node 0 has prepared to hosts that lack it: ``python -m launcher.courier offer|receive``.

What is prepared is a JSON object; every value of it that names a folder is sent along. A folder that is already
there (the same path with the same files, or received earlier) is not sent again; what is sent is verified by sha256.
Bytes travel unencrypted, as those of the ranks do; who has not this run's token gets none.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedRWPair
from pathlib import Path
from typing import Any, Final

from falcon_dist.contract import PREPARING_FAULT

TOKEN: Final = "FALCON_COURIER_TOKEN"  # noqa: S105  # the variable's name
CHECKPOINT: Final = "checkpoint"
CHUNK: Final = 1 << 20
STRANGER_S: Final = 5.0
TOKEN_LINE: Final = 256
LONGEST_LINE: Final = 64 << 20
Files = list[tuple[str, int, int]]
Stream = BufferedRWPair


def offer(
    listening: socket.socket, prepared: Path, receivers: int, token: str, checkpoints: Path | None = None
) -> None:
    """Serves so many receivers side by side, each to its end.

    ``checkpoints``: the newest folder below it is sent along too, for a run that is resumed.

    Raises:
        OSError: one of them went away.
    """
    folders = {key: Folder(Path(text)) for key, text in _folders(prepared).items()}
    if checkpoints is not None and (newest := _newest(checkpoints)):
        folders[CHECKPOINT] = Folder(newest)
    served: list[Future[None]] = []
    with ThreadPoolExecutor(receivers) as pool:
        while len(served) < receivers:
            connection, _ = listening.accept()
            if stream := _admitted(connection, token):
                served.append(pool.submit(_serve, stream, prepared, folders))
            connection.close()  # the stream keeps it open
    for one in served:
        one.result()


def receive(addr: str, port: int, prepared: Path, token: str) -> None:
    """Makes sure this host has what node 0 has prepared, and writes where it is.

    Raises:
        OSError, ValueError: it cannot be had.
    """
    with socket.create_connection((addr, port)) as connection, connection.makefile("rwb") as stream:
        _write(stream, {"token": token})
        told = _read(stream)  # as soon as node 0 is ready, however long that takes
        values = dict(told["values"])
        for key, folder in told["folders"].items():
            if key == CHECKPOINT:
                _place(stream, folder)
            else:
                values[key] = str(_have(stream, key, folder))
        _write(stream, {"want": "nothing"})
    prepared.parent.mkdir(parents=True, exist_ok=True)
    prepared.write_text(json.dumps(values, indent=1) + "\n")


class Folder:
    """One folder on offer; its digests are made when somebody asks, once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = files_of(path)
        self._lock = threading.Lock()
        self._digests: dict[str, str] | None = None

    def digests(self) -> dict[str, str]:
        """sha256 of every file."""
        with self._lock:
            if self._digests is None:
                self._digests = {name: _sha256(self.path / name) for name, _, _ in self.files}
            return self._digests


def files_of(path: Path) -> Files:
    """Name, size and time of every file below a folder; links are followed."""
    found = [(p, p.stat()) for p in sorted(path.rglob("*")) if p.is_file()]
    return [(str(p.relative_to(path)), stat.st_size, stat.st_mtime_ns) for p, stat in found]


def _admitted(connection: socket.socket, token: str) -> Stream | None:
    """The connection as a stream, if it begins with this run's token within a short time."""
    try:
        if hmac.compare_digest(str(json.loads(_first_line(connection))["token"]), token):
            connection.settimeout(None)
            return connection.makefile("rwb")
    except (OSError, ValueError, TypeError, KeyError):
        pass  # a port scanner
    return None


def _first_line(connection: socket.socket) -> bytes:
    """All of it within STRANGER_S, however it drips; too long a one without its end."""
    deadline, line = time.monotonic() + STRANGER_S, b""
    while not line.endswith(b"\n") and len(line) < TOKEN_LINE:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        line += connection.recv(1) or b"\n"
    return line


def _serve(stream: Stream, prepared: Path, folders: Mapping[str, Folder]) -> None:
    told = {key: {"path": str(f.path), "files": f.files} for key, f in folders.items()}
    _write(stream, {"values": json.loads(prepared.read_text()), "folders": told})
    while (wanted := _read(stream))["want"] != "nothing":
        folder = folders[wanted["key"]]
        if wanted["want"] == "digests":
            _write(stream, folder.digests())
        else:
            _send_files(stream, folder)
    stream.close()


def _send_files(stream: Stream, folder: Folder) -> None:
    for name, _, _ in folder.files:
        with (folder.path / name).open("rb") as file:
            shutil.copyfileobj(file, stream, CHUNK)
    stream.flush()


def _have(stream: Stream, key: str, told: Mapping[str, Any]) -> Path:
    """This host's folder with the same content, fetched where there is none."""
    files = _files(told)
    same_path = Path(told["path"])
    if same_path.is_dir() and files_of(same_path) == files:
        return same_path
    _write(stream, {"want": "digests", "key": key})
    digests = _read(stream)
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]
    path = _cache() / "received" / whole
    if path.is_dir() and Folder(path).digests() != digests:
        _set_aside(path)
        print(f'{key}: "{path}" is not what was received once (sha256 differs); fetched anew', flush=True)
    if not path.is_dir():
        _write(stream, {"want": "files", "key": key})
        _fetch(stream, path, files, digests)
        total = sum(size for _, size, _ in files)
        print(f"{key}: {len(files)} files, {total / 1e6:,.1f} MB received", flush=True)
    return path


def _place(stream: Stream, told: Mapping[str, Any]) -> None:
    """Makes sure the checkpoint is here under the very path it has on node 0, and has the same bytes."""
    path, files = Path(told["path"]), _files(told)
    sizes = [(name, size) for name, size, _ in files]
    here = files_of(path) if path.is_dir() else []
    if here == files:
        return
    _write(stream, {"want": "digests", "key": CHECKPOINT})
    digests = _read(stream)
    if [(name, size) for name, size, _ in here] == sizes and Folder(path).digests() == digests:
        return
    if path.exists():
        _set_aside(path)
    _write(stream, {"want": "files", "key": CHECKPOINT})
    _fetch(stream, path, files, digests)
    print(f"{path.name}: {sum(size for _, size in sizes) / 1e6:,.1f} MB received", flush=True)


def _newest(checkpoints: Path) -> Path | None:
    """The newest committed checkpoint; which of them can be trusted is rank 0's to say."""
    names = {path: path.name.removeprefix("step-") for path in checkpoints.glob("step-*")}
    whole = {int(step): p for p, step in names.items() if step.isdecimal() and (p / "manifest.json").is_file()}
    return whole[max(whole)] if whole else None


def _files(told: Mapping[str, Any]) -> Files:
    return [(str(name), int(size), int(when)) for name, size, when in told["files"]]


def _fetch(stream: Stream, path: Path, files: Files, digests: Mapping[str, str]) -> None:
    partial = _beside(path, "partial")
    try:
        for name, size, _ in files:
            _fetch_file(stream, _inside(partial, name), size, digests[name])
        _put(partial, path, digests)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, path: Path, digests: Mapping[str, str]) -> None:
    """Gives what was fetched its place, unless another host that shares the disk has put the same there meanwhile."""
    try:
        partial.rename(path)
    except OSError:
        if Folder(path).digests() != digests:
            raise


def _set_aside(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another host that shares the disk was quicker
        path.rename(_beside(path, "refused"))


def _beside(path: Path, what: str) -> Path:
    """A name that no other process has, on any host."""
    return path.with_name(f"{path.name}.{what}-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}")


def _fetch_file(stream: Stream, path: Path, size: int, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    with path.open("wb") as file:
        while size:
            data = stream.read(min(size, CHUNK))
            if not data:
                raise ConnectionError("peer is gone: node 0 ended before all was sent")
            whole.update(data)
            file.write(data)
            size -= len(data)
    if whole.hexdigest() != digest:
        raise ValueError(f'received other bytes than were sent: "{path.name}"')


def _inside(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f'a file outside its folder: "{name}"')
    return folder / name


def _folders(prepared: Path) -> dict[str, str]:
    values = json.loads(prepared.read_text())
    return {k: v for k, v in values.items() if isinstance(v, str) and Path(v).is_absolute() and Path(v).is_dir()}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "falcon-dist"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(stream: Stream, values: Mapping[str, Any]) -> None:
    stream.write(json.dumps(values).encode() + b"\n")
    stream.flush()


def _read(stream: Stream) -> dict[str, Any]:
    line = stream.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise ConnectionError("peer is gone")
    return dict(json.loads(line))


def main(argv: Sequence[str]) -> None:
    """``offer FD PREPARED RECEIVERS [CHECKPOINTS]`` or ``receive ADDR PORT PREPARED``, the token in the environment."""
    token = os.environ[TOKEN]
    try:
        match argv:
            case ["offer", descriptor, prepared, receivers, *checkpoints]:
                with socket.socket(fileno=int(descriptor)) as listening:
                    offer(listening, Path(prepared), int(receivers), token, *map(Path, checkpoints))
            case ["receive", addr, port, prepared]:
                receive(addr, int(port), Path(prepared), token)
            case _:
                sys.exit("launcher.courier: started by the agents of a run only")
    except (OSError, ValueError) as fault:
        sys.exit(f"{PREPARING_FAULT}{fault}")


if __name__ == "__main__":
    main(sys.argv[1:])
