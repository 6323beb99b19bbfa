"""Our safetensors files against the library's, and what is noticed while they are read."""

from __future__ import annotations

import errno
import hashlib
import mmap
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from falcon_dist import tensor_file

TENSORS = {
    "weight": torch.randn(7, 5).to(torch.bfloat16),
    "turned": torch.randn(4, 6).T,
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
}


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}


def test_empty_tensors_lie_side_by_side_in_private_memory_that_huge_pages_are_asked_for() -> None:
    tensors = tensor_file.empty(
        {"odd": ((3, 7), torch.bool), "none": ((0, 3), torch.int8), "much": ((5, 9), torch.float64)}
    )
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "odd": ((3, 7), torch.bool),
        "none": ((0, 3), torch.int8),
        "much": ((5, 9), torch.float64),
    }
    for tensor in tensors.values():
        tensor.fill_(1)
    assert all(bool((tensor == 1).all()) for tensor in tensors.values())
    assert tensors["much"].data_ptr() - tensors["odd"].data_ptr() == 64
    access, flags = mapping_of(tensors["odd"].data_ptr())
    assert access == "rw-p"  # what may be shared has huge pages only where tmpfs has them
    assert "hg" in flags


def test_memory_comes_in_small_pages_where_the_kernel_knows_no_huge_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    tensor = tensor_file.empty({"a": ((3, 7), torch.float32)})["a"].fill_(2)
    assert float(tensor.sum()) == 42


def mapping_of(address: int) -> tuple[str, list[str]]:
    """Access and flags of the memory at an address, by /proc/self/smaps."""
    access = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            access = rest.split()[0] if begin <= address < end else None
        elif access and name == "VmFlags:":
            return access, rest.split()
    raise LookupError(address)


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    told = tensor_file.write(path, TENSORS)
    assert told == (path.stat().st_size, blake3(path.read_bytes()).hexdigest(), "blake3")
    read = load_file(path)
    assert list(read) == sorted(TENSORS) or set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_what_the_library_writes_is_read_here(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    targets = blank()
    assert tensor_file.read_into(path, targets).hash == blake3(path.read_bytes()).hexdigest()
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert tensor_file.read_into(path, targets, "sha256") == (path.stat().st_size, wanted, "sha256")
    assert tensor_file.read(path, "sha256")[1].hash == wanted
    for name, tensor in TENSORS.items():
        assert torch.equal(targets[name], tensor)
    assert set(tensor_file.names_in(path)) == set(TENSORS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("weight"), 'it holds other tensors than the model has: "weight"'),
        (lambda t: t.update(weight=torch.zeros(5, 7, dtype=torch.bfloat16)), r'"weight" is BF16 \[7, 5\], the model'),
        (lambda t: t.update(weight=torch.zeros(7, 5)), r'"weight" is BF16 \[7, 5\], the model has F32 \[7, 5\]'),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path: Path, change, reason: str) -> None:
    tensor_file.write(tmp_path / "a", TENSORS)
    targets = blank()
    change(targets)
    with pytest.raises(ValueError, match=reason):
        tensor_file.read_into(tmp_path / "a", targets)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "a", TENSORS)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match="it ends too early"):
        tensor_file.read_into(tmp_path / "a", blank())
