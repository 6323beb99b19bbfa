"""safetensors files written and read while their bytes are hashed, without holding the interpreter.

The safetensors library copies every tensor once more and holds Python's global lock while it writes, so a thread
that saves would stop the one that trains. The format is a JSON header and the raw bytes, by its specification
(https://github.com/huggingface/safetensors#format); tests read ours with the library, and the library's with ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch

from falcon_dist import digest

DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
KINDS: Final = {name: dtype for dtype, name in DTYPES.items()}
CHUNK_BYTES: Final = 256 << 10
"""Stays in a core's own cache between its copy and its hash."""
_ALIGNMENT: Final = 8
_LINE_BYTES: Final = 64
"""Tensors begin on a cache line of their own."""


class Told(NamedTuple):
    """A file as it was written."""

    bytes: int
    hash: str
    """Hex."""
    kind: str = digest.KIND
    """What it is hashed by, of digest.KINDS."""


def write(path: Path, tensors: Mapping[str, torch.Tensor], values: Iterable[torch.Tensor] | None = None) -> Told:
    """Writes CPU tensors of any shape and synchronises the file with the disk.

    ``values`` are what is written, where ``tensors`` only tell names, shapes and dtypes; taken one after the other.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    hashed = digest.hasher()
    with path.open("wb", buffering=0) as file:
        size = _put(file, memoryview(_header(tensors)), hashed)
        for tensor in tensors.values() if values is None else values:
            size += _put(file, bytes_of(tensor.detach().contiguous()), hashed)
        os.fsync(file.fileno())
    return Told(size, hashed.hexdigest())


def _put(file: BinaryIO, data: memoryview, hashed: Any) -> int:
    for start in range(0, len(data), CHUNK_BYTES):
        whole = chunk = data[start : start + CHUNK_BYTES]
        while chunk:
            chunk = chunk[file.write(chunk) :]
        hashed.update(whole)
    return len(data)


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def empty(spec: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, torch.Tensor]:
    """CPU tensors of these shapes and dtypes that are about to be filled, in one piece of memory.

    It asks for huge pages, which take a sixth of the time that small ones do and are given to private memory only. All
    of it is given back when the last of the tensors is gone.
    """
    starts, end = {}, 0
    for name, (shape, dtype) in spec.items():
        starts[name] = end
        end += -(-math.prod(shape) * dtype.itemsize // _LINE_BYTES) * _LINE_BYTES
    memory = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel may know no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return {
        name: whole[starts[name] :][: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
        for name, (shape, dtype) in spec.items()
    }


def names_in(path: Path) -> list[str]:
    """The names of a file's tensors.

    Raises:
        ValueError: it is no such file.
    """
    with _Reading(path) as reading:
        return list(reading.header)


def read_into(path: Path, targets: Mapping[str, torch.Tensor], kind: str = digest.KIND) -> Told:
    """Fills the targets, which the file must hold exactly, and tells what was read, hashed as ``kind`` says.

    What was read is to be compared with what was written before the targets are used.

    Raises:
        ValueError: names, shapes or dtypes are others; the targets may be half filled.
    """
    with _Reading(path, kind) as reading:
        _check_names(reading.header, targets)
        for name, told in reading.in_order():
            reading.fill(name, told, targets[name])
        return reading.told()


def read(path: Path, kind: str = digest.KIND) -> tuple[dict[str, torch.Tensor], Told]:
    """All tensors of a file, and what was read; see ``read_into``.

    Raises:
        ValueError: it is no such file.
    """
    with _Reading(path, kind) as reading:
        tensors = empty({name: (told["shape"], KINDS[told["dtype"]]) for name, told in reading.in_order()})
        for name, told in reading.in_order():
            reading.fill(name, told, tensors[name])
        return tensors, reading.told()


class _Reading:
    """A file that is being read from its start to its end."""

    def __init__(self, path: Path, kind: str = digest.KIND) -> None:
        self._file = path.open("rb", buffering=0)
        self._kind, self._hashed = kind, digest.hasher(kind)
        self._done = 0

    def __enter__(self) -> _Reading:
        self.header = self._read_header()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def told(self) -> Told:
        return Told(self._done, self._hashed.hexdigest(), self._kind)

    def in_order(self) -> list[tuple[str, dict[str, Any]]]:
        return sorted(self.header.items(), key=lambda item: item[1]["data_offsets"])

    def fill(self, name: str, told: Mapping[str, Any], target: torch.Tensor) -> None:
        """The next tensor of the file."""
        here = (DTYPES[target.dtype], list(target.shape))
        if (told["dtype"], told["shape"]) != here:
            raise ValueError(f'"{name}" is {told["dtype"]} {told["shape"]}, the model has {here[0]} {here[1]}')
        whole = target.detach() if target.is_contiguous() else torch.empty_like(target).contiguous()
        self._read(bytes_of(whole))
        if not target.is_contiguous():
            target.copy_(whole)

    def _read_header(self) -> dict[str, Any]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._take(8), "little")
        if length > size:
            raise ValueError("its header is damaged")
        header: dict[str, Any] = json.loads(self._take(length))
        header.pop("__metadata__", None)
        return header

    def _take(self, count: int) -> bytes:
        data = bytearray(count)
        self._read(memoryview(data))
        return bytes(data)

    def _read(self, into: memoryview) -> None:
        """Chunk by chunk, so that what is hashed is still in the cache."""
        while into:
            count = self._file.readinto(into[:CHUNK_BYTES])
            if not count:
                raise ValueError("it ends too early")
            self._hashed.update(into[:count])
            self._done += count
            into = into[count:]


def _check_names(header: Mapping[str, Any], targets: Mapping[str, torch.Tensor]) -> None:
    if odd := sorted(header.keys() ^ targets.keys()):
        raise ValueError(f'it holds other tensors than the model has: "{odd[0]}"')
