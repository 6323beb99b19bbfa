"""Who is silent, and who only cannot speak because a disk stands still."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import agent, frames, silence, stacks
from launcher.transport import Channel, Spawned
from launcher.wire import BEAT_S, HELD, Lines

NOW = 1000.0
HELD_CHILD = """
import os
# The one that starts a process is held until that one has become another program; here it waits for a FIFO's writer.
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, "fifo", os.O_RDONLY, 0)])
"""
KEPT = """
import os, subprocess, sys
from launcher import agent
held = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
agent.keep(held.pid)
"""


def heard(host: str, quiet_s: float, held_s: float = NOW, fd: int = 7) -> SimpleNamespace:
    return SimpleNamespace(host=host, heard_at=NOW - quiet_s, held_at=NOW - held_s, fileno=lambda: fd)


def test_words_that_nobody_has_read_yet_break_a_silence():
    living = {0: heard("a", 40, fd=3), 1: heard("b", 40, fd=4)}
    assert silence.silent(living, {3, 4}, NOW, running=True).node_ranks == ()
    dead = silence.silent(living, {3}, NOW, running=True)
    assert (dead.node_ranks, dead.blamed) == ((1,), True)


def test_an_agent_that_a_disk_holds_is_alive_while_ranks_run_and_is_told_of():
    living = {0: heard("a", 0.2), 1: heard("b", 40, held_s=0.9), 2: heard("c", 40, held_s=11)}
    assert silence.silent(living, (), NOW, running=True).node_ranks == (2,)
    assert silence.silent(living, (), NOW, running=False).node_ranks == (1, 2)  # it has to end its ranks now
    told = silence.held(living)
    assert sorted(told) == [1, 2]
    assert told[1].startswith("b: its agent is held by a disk")


def test_the_keeper_speaks_for_an_agent_that_the_kernel_holds(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    words = [sys.executable, "-c", KEPT, HELD_CHILD]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, cwd=tmp_path, env=env)
    channel = Channel("node1", Spawned(process))
    begun, deadline = channel.heard_at, time.monotonic() + 30
    while channel.held_at < begun + BEAT_S:
        assert time.monotonic() < deadline
        assert channel.receive() == []
    assert channel.heard_at == begun
    (tmp_path / "fifo").write_text("")  # now it is let go, and ends
    assert channel.close() == 0


def test_who_sleeps_is_not_held():
    with subprocess.Popen(["sleep", "60"]) as process:
        time.sleep(0.1)
        assert not stacks.is_held(process.pid)
        process.kill()


def test_a_word_amid_a_line_leaves_the_line_whole():
    reader, writer = os.pipe()
    lines, said = Lines(reader), json.dumps({"event": "note", "text": "\0"}).encode()
    os.write(writer, said[:9] + HELD + said[9:] + b"\n" + HELD)
    assert lines.read() == [said]
    assert lines.held
    os.write(writer, b"{}\n")
    assert (lines.read(), lines.held) == ([b"{}"], False)
    os.close(reader)
    os.close(writer)


def test_in_slurm_it_travels_beside_the_lines():
    joiner = frames.Joiner(frozenset({"node1"}))
    first, *rest = frames.up("node1", b"x" * 1000)
    assert joiner.take(first[:-1]) is None
    assert joiner.take(frames.up_held("node1")[:-1]) == frames.Said(host="node1", held=True)
    assert [said.line for piece in rest if (said := joiner.take(piece[:-1]))] == [b"x" * 1000]


@pytest.mark.parametrize("words", [b'{"command": "alive"}\n', b""])
def test_an_agent_that_was_held_hears_what_was_said_meanwhile(monkeypatch, words):
    """And goes where nothing was: its launcher is gone."""
    (here, launcher), (sink, out) = os.pipe(), os.pipe()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: here))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(fileno=lambda: out))
    held = agent.Agent()
    held.listen(here, held._on_command)
    held._heard_at -= 2 * agent.PATIENCE_S
    os.write(launcher, words)
    held._turn()
    assert held._leaving is (not words)
    for fd in (here, launcher, sink, out):
        os.close(fd)
