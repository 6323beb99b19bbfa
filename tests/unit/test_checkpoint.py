"""The commit protocol, verification, and what is chosen to resume from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from falcon_dist import checkpoint
from falcon_dist.contract import UserError
from launcher.courier import _newest


def commit(root: Path, step: int, text: str = "weights") -> Path:
    with checkpoint.committed(root, step, {"run_id": "r"}) as folder:
        (folder / "model.safetensors").write_text(f"{text} {step}")
        (folder / "train_state").mkdir()
        (folder / "train_state" / "counters.json").write_text("{}")
    return root / checkpoint.folder_name(step)


def test_committed_folder_verifies_and_tells_its_run(tmp_path: Path) -> None:
    path = commit(tmp_path, 500)
    assert path.name == "step-000500"
    assert checkpoint.fault_of(path) is None
    assert checkpoint.read(path).facts["run_id"] == "r"
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        "model.safetensors",
        "train_state/counters.json",
    }
    assert names(tmp_path) == ["step-000500"]


def test_interrupted_save_leaves_the_older_one_alone(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt), checkpoint.committed(tmp_path, 2, {}) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["step-000001"]


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    with pytest.raises(UserError, match="No space left on device; earlier checkpoints are untouched"):
        with checkpoint.committed(tmp_path, 2, {}), Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)
    assert checkpoint.newest_verified(tmp_path).newest.step == 1
    assert names(tmp_path) == ["step-000001"]


def test_room_is_looked_for_in_words_that_tell_how_much(tmp_path: Path) -> None:
    checkpoint.check_room(tmp_path, 1)
    with pytest.raises(OSError, match=r"No space left on device: 1000000000\.0 GB needed, \d+\.\d [GM]B free"):
        checkpoint.check_room(tmp_path, 10**18)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_any_bit_of_the_manifest_itself_is_caught_and_named(tmp_path: Path) -> None:
    """Also where it still is JSON: another step, another sha256, another name."""
    manifest = commit(tmp_path, 1) / checkpoint.MANIFEST
    whole = manifest.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        assert checkpoint.fault_of(manifest.parent) == "manifest.json is damaged", data
    manifest.write_bytes(whole)
    assert checkpoint.fault_of(manifest.parent) is None


@pytest.mark.parametrize("name", ["model.safetensors", "train_state/counters.json"])
def test_one_flipped_bit_is_caught_and_named(tmp_path: Path, name: str) -> None:
    commit(tmp_path, 1)
    newer = commit(tmp_path, 2)
    flip_bit(newer / name)
    choice = checkpoint.newest_verified(tmp_path)
    assert choice.newest is not None
    assert choice.newest.step == 1
    assert choice.refused == ((newer, f"{name} is not what was written (blake3 differs)"),)


def test_a_checkpoint_of_before_is_known_by_sha256(tmp_path: Path) -> None:
    older = commit(tmp_path, 1)
    facts, files = checkpoint.read_manifest(older)
    entries = {name: checkpoint.entry(checkpoint.told_of(older / name, "sha256")) for name in files}
    assert all(set(entry) == {"bytes", "sha256"} for entry in entries.values())
    (older / checkpoint.MANIFEST).write_text(checkpoint.manifest_text(facts, entries))
    assert checkpoint.fault_of(older) is None
    flip_bit(older / "model.safetensors")
    assert checkpoint.fault_of(older) == "model.safetensors is not what was written (sha256 differs)"


@pytest.mark.parametrize("odd", [{"bytes": 1}, {"bytes": 1, "md5": "a"}, {"bytes": 1, "blake3": "a", "sha256": "b"}, 7])
def test_an_entry_of_another_form_is_damage(tmp_path: Path, odd: object) -> None:
    made = commit(tmp_path, 1)
    facts, _ = checkpoint.read_manifest(made)
    (made / checkpoint.MANIFEST).write_text(checkpoint.manifest_text(facts, {"model.safetensors": odd}))
    assert checkpoint.fault_of(made) == "manifest.json is damaged"


def test_who_reads_tensors_next_has_only_their_size_verified(tmp_path: Path) -> None:
    older, newer = commit(tmp_path, 1), commit(tmp_path, 2)
    flip_bit(newer / "model.safetensors")
    assert checkpoint.newest_verified(tmp_path, tensors=False).newest.path == newer
    assert checkpoint.newest_verified(tmp_path, tensors=False, below=2).newest.path == older
    (newer / "model.safetensors").write_text("short")
    choice = checkpoint.newest_verified(tmp_path, tensors=False)
    assert choice.newest.path == older
    assert choice.refused == ((newer, "model.safetensors has 5 bytes, not 9"),)
    flip_bit(older / "train_state/counters.json")
    assert checkpoint.newest_verified(tmp_path, tensors=False).newest is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: (p / "model.safetensors").write_text("short"), "model.safetensors has 5 bytes, not 9"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json is damaged"),
        (lambda p: shutil.rmtree(p / "train_state"), "train_state/counters.json is missing"),
    ],
)
def test_refusals_name_their_reason(tmp_path: Path, damage, reason: str) -> None:
    damage(commit(tmp_path, 7))
    choice = checkpoint.newest_verified(tmp_path)
    assert choice.newest is None
    assert choice.refused[0][1] == reason


def test_what_the_disk_does_not_give_is_refused_and_an_older_one_taken(tmp_path: Path) -> None:
    """A read of /proc/self/mem at 0 fails with EIO, as one of a bad sector does."""
    older, newer = commit(tmp_path, 1), tmp_path / checkpoint.folder_name(2)
    with checkpoint.committed(tmp_path, 2, {}) as folder:
        (folder / "train_state").mkdir()
        (folder / "train_state" / "counters.json").write_text("")
    (newer / "train_state" / "counters.json").unlink()
    (newer / "train_state" / "counters.json").symlink_to("/proc/self/mem")
    choice = checkpoint.newest_verified(tmp_path)
    assert choice.newest.path == older
    assert choice.refused == ((newer, "train_state/counters.json cannot be read: Input/output error"),)


def test_only_one_with_the_optimizers_state_can_be_gone_on_with(tmp_path: Path) -> None:
    with_state = commit(tmp_path, 7)
    with checkpoint.committed(tmp_path, 10, {}) as folder:
        (folder / "model.safetensors").write_text("weights")
    choice = checkpoint.newest_verified(tmp_path, with_state=True)
    assert choice.newest.path == with_state
    assert choice.refused == ((tmp_path / "step-000010", checkpoint.NO_STATE),)
    assert checkpoint.newest_verified(tmp_path).newest.step == 10


def test_partial_folders_are_never_chosen_and_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "step-000009.partial-1").mkdir()
    assert checkpoint.newest_verified(tmp_path) == checkpoint.Choice(None, ())
    checkpoint.clear_partial(tmp_path)
    assert not names(tmp_path)


def test_the_newest_is_that_of_the_highest_step_of_however_many_digits(tmp_path: Path) -> None:
    for step in (999_500, 1_000_000):
        with checkpoint.committed(tmp_path, step, {}) as folder:
            (folder / "file").write_text("")
    newest = checkpoint.newest_verified(tmp_path).newest
    assert newest is not None
    assert newest.step == 1_000_000
    assert checkpoint.newest_verified(tmp_path, below=1_000_000).newest == checkpoint.read(tmp_path / "step-999500")
    assert _newest(tmp_path) == tmp_path / "step-1000000"


def test_a_whole_checkpoint_that_a_resume_refused_is_put_aside_for_the_new_one(tmp_path: Path) -> None:
    """Else weights trained with the settings of before would stand for what is trained now."""
    path = commit(tmp_path, 5)
    commit(tmp_path, 5, "other")
    assert (path / "model.safetensors").read_text() == "weights 5"
    for text in ("anew", "once more"):
        with checkpoint.committed(tmp_path, 5, {}, anew=True) as folder:
            (folder / "model.safetensors").write_text(text)
    assert (path / "model.safetensors").read_text() == "once more"
    aside = sorted(f.read_text() for f in tmp_path.glob("step-000005.refused-*/model.safetensors"))
    assert aside == ["anew", "weights 5"]
    newest = checkpoint.newest_verified(tmp_path).newest
    assert newest is not None
    assert newest.path == path
