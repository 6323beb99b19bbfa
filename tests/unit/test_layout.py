"""Files of a checkpoint, and who writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_dist.contract import UserError
from falcon_dist.layout import parse_size, shards


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 3000))
def test_every_tensor_is_in_one_file_and_no_file_is_too_large(counts: list[int], writers: int, most: int) -> None:
    sizes = {f"t{number}": size for number, size in enumerate(counts)}
    files = shards(sizes, "model", writers=writers, max_bytes=most)
    assert [name for file in files for name in file.tensors] == list(sizes)
    assert len({file.name for file in files}) == len(files)
    for file in files:
        assert 0 <= file.writer < writers
        assert sum(sizes[name] for name in file.tensors) <= most or len(file.tensors) == 1
    shares = [sum(sizes[n] for f in files if f.writer == w for n in f.tensors) for w in range(writers)]
    assert max(shares) <= sum(counts) / writers + max(counts)


def test_names_are_those_of_transformers() -> None:
    assert [file.name for file in shards({"a": 4}, "model", writers=1, max_bytes=9)] == ["model.safetensors"]
    two = shards({"a": 4, "b": 4}, "model", writers=2, max_bytes=9)
    assert [(file.name, file.writer) for file in two] == [
        ("model-00001-of-00002.safetensors", 0),
        ("model-00002-of-00002.safetensors", 1),
    ]


@pytest.mark.parametrize(("text", "size"), [("200MB", 200_000_000), ("2GB", 2_000_000_000), ("1.5 kib", 1536)])
def test_sizes_are_read_as_transformers_does(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "0MB", "-1GB", "2TB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_shard_size must be a size"):
        parse_size(text)
