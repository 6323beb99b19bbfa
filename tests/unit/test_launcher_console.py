"""What a person sees of a run, where nobody reads it or not for now."""

import os
import select
from pathlib import Path

import pytest

from launcher.console import Console
from launcher.outlet import MOST_WAITING, Outlet


def read_all(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        return file.read().decode()


def test_texts_arrive_in_order():
    reader, writer = os.pipe()
    outlet = Outlet()
    for number in range(100):
        outlet.put(writer, f"{number}\n")
    outlet.close()
    os.close(writer)
    assert read_all(reader).split() == [str(number) for number in range(100)]


def test_who_does_not_read_holds_up_nobody_and_is_told_what_was_left_out():
    reader, writer = os.pipe()
    outlet, line = Outlet(), "x" * 99 + "\n"
    for _ in range(MOST_WAITING + 3_000):  # more than a pipe and all that may wait
        outlet.put(writer, line, always=False)
    outlet.put(writer, "the end\n")
    got = b""
    while not got.endswith(b"the end\n"):
        assert select.select([reader], [], [], 10)[0]
        got += os.read(reader, 1 << 16)
    *lines, told, last = got.decode().splitlines()
    assert len(lines) >= MOST_WAITING
    assert told == f"({MOST_WAITING + 3_000 - len(lines)} lines are left out here, which nobody read)"
    assert last == "the end"
    outlet.close()


def test_a_reader_that_is_gone_silences_its_descriptor_only():
    gone, deaf = os.pipe()
    os.close(gone)
    reader, writer = os.pipe()
    outlet = Outlet()
    for fd in (deaf, writer, deaf, writer):
        outlet.put(fd, "one\n")
    outlet.close()
    os.close(writer)
    os.close(deaf)
    assert read_all(reader) == "one\none\n"


def test_a_descriptor_that_does_not_wait_gets_all_the_same():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    outlet = Outlet()
    outlet.put(writer, "x" * 300_000 + "\n")
    got = b""
    while not got.endswith(b"\n"):
        assert select.select([reader], [], [], 10)[0]
        got += os.read(reader, 1 << 16)
    assert len(got) == 300_001
    outlet.close()
    os.close(reader)
    os.close(writer)


def test_lines_that_come_fast_are_all_written_where_somebody_takes_them(tmp_path):
    path = tmp_path / "log"
    outlet = Outlet()
    with path.open("wb") as file:
        for number in range(50_000):
            outlet.put(file.fileno(), f"{number}\n", always=False)
        outlet.close()
    assert path.read_text().split() == [str(number) for number in range(50_000)]


def test_an_output_that_cannot_be_written_is_told_once(capfd):
    outlet = Outlet()
    with Path("/dev/full").open("wb") as full:
        for _ in range(3):
            outlet.put(full.fileno(), "a line\n")
        outlet.close()
    told = "output cannot be written any more: No space left on device; the run folder has all\n"
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("odd", [{"loss": None}, {"eta_s": float("inf")}, {"step": 1, "total": "many"}])
def test_a_step_that_another_program_tells_of_in_words_of_its_own_ends_nothing(odd, capfd):
    console = Console(quiet=False)
    console._is_terminal = True
    step = {"event": "step", "step": 1, "total": 2, "eta_s": 1.0, "log": True, "loss": 1.0}
    with console:
        console.main_told({**step, **odd})
    assert "Traceback" not in capfd.readouterr().err
