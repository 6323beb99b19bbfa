"""What an agent passes on of a process's output: all of it, but never so much at once that nothing else is done."""

from types import SimpleNamespace

from launcher import rundir
from launcher.child import AT_ONCE, TAIL_LINES, Tail, _empty_file
from launcher.crew import FLOOD_AT_END_BYTES, Crew


class Teller:
    """The agent, as far as a crew needs one."""

    unsent = FLOOD_AT_END_BYTES + 1

    def __init__(self):
        self.told = []

    def emit(self, event, **values):
        self.told.append(event)


def test_a_file_that_grows_fast_is_read_in_parts(tmp_path):
    path = tmp_path / "stdout"
    path.write_text("".join(f"{number:9}\n" for number in range(70_000)))
    tail, parts = Tail(path), []
    while not parts or tail.behind:
        parts.append(tail.read())
        assert sum(len(line) + 1 for line in parts[-1]) <= AT_ONCE
    assert len(parts) > 1
    assert [int(line) for part in parts for line in part] == list(range(70_000))
    assert (tail.read(final=True), tail.skip()) == ([], False)
    tail.close()


def test_the_end_of_a_process_does_not_wait_for_all_it_wrote(tmp_path):
    path = tmp_path / "stdout"
    path.write_text("".join(f"{number:9}\n" for number in range(70_000)))
    teller, tail = Teller(), Tail(path)
    child = SimpleNamespace(order=SimpleNamespace(name="rank", rank=0), tails={"stdout": tail})
    Crew(teller)._tell_rest_of(child)
    assert teller.told == ["note"]
    assert [int(line) for line in tail.last] == list(range(70_000))[-TAIL_LINES:]
    tail.close()


def test_what_a_task_before_has_written_is_not_told_again(tmp_path):
    (tmp_path / "stdout").write_text("of the one before\n")
    tail = _empty_file(tmp_path, "stdout")
    with (tmp_path / "stdout").open("a") as file:
        file.write("of this one\n")
    assert tail.read() == ["of this one"]
    assert [*tail.last] == ["of this one"]
    tail.close()


def test_a_file_that_cannot_be_read_for_a_while_ends_no_agent(tmp_path):
    """A folder gives EISDIR, as a file server that is away gives EIO."""
    tail = Tail(tmp_path)
    assert tail.read() == []
    tail.close()
    assert rundir.kept(tmp_path / "gone") == {}
