"""README's commands, run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import BIN, environment, write_inputs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPT = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print("ranks", int(total), sys.argv[1:])
dist.destroy_process_group()
"""


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    write_inputs(folder)
    (folder / "my.jsonl").write_bytes((folder / "data.jsonl").read_bytes())
    (folder / "prompts.txt").write_text("What is a socket?\nstop\n")
    (folder / "my_script.py").write_text(SCRIPT)
    return folder


def test_there_are_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("make ")])
def test_command_works(folder: Path, command: str) -> None:
    words = shlex.split(command)
    feed = folder / words[words.index("<") + 1] if "<" in words else None
    words = words[: words.index("<")] if feed else words
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        cwd=folder,
        env=environment(),
        input=feed.read_text() if feed else None,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_links_and_named_files_exist() -> None:
    for name in re.findall(r"`([\w./-]+\.(?:py|md|txt|toml))`", README):
        if "/" in name or name.isupper():
            assert (ROOT / name).exists(), name
