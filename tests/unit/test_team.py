import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from falcon_dist import evaluate, measure, team
from falcon_dist.config import EvaluateConfig, TrainConfig
from falcon_dist.masking import Masking
from falcon_dist.team import SaveError, Team
from falcon_dist.world import World


class Late:
    """A board on which the end of a save is written down right after somebody looked for it."""

    def __init__(self, text):
        self._board, self._text = HashStore(), text

    def check(self, names):
        found = self._board.check(names)
        self._board.set("save/7/done", self._text)
        return found

    def get(self, name):
        return self._board.get(name)

    def add(self, name, count):
        return self._board.add(name, count)


def test_an_end_that_comes_while_it_is_looked_for_is_heard():
    assert Team(board=Late("{}"), rank=1, writers=(0, 1)).hear("7", "done") == {}


def test_what_will_never_be_said_is_not_waited_for():
    late = Team(board=Late('{"fault": "No space left on device"}'), rank=1, writers=(0, 1))
    with pytest.raises(SaveError, match="No space left"):
        late.hear("7", "folder")


def test_nobody_is_waited_for_without_a_sign_and_anybody_with_one(monkeypatch):
    monkeypatch.setattr(team, "STALLED_S", 0.4)
    alone = Team(board=HashStore(), rank=1, writers=(0, 1))
    with pytest.raises(RuntimeError, match=r'"folder" of the save of step 7 was not told, no sign for 0\.4 s'):
        alone.hear("7", "folder")
    with pytest.raises(RuntimeError, match=r"not all of 2 ranks said anything about resume/7, no sign for 0\.4 s"):
        alone.everyone_says("resume/7", "", 2)

    def work():
        for _ in range(8):
            time.sleep(0.2)
            alone.get_on()
        alone.tell("9", "folder", "here")

    working = threading.Thread(target=work)
    working.start()
    assert alone.hear("9", "folder") == "here"
    working.join()


def meeting(work, ranks=2):
    """Has every rank, a thread, do its work; what went wrong with each."""
    board, faults = HashStore(), {}

    def live(rank):
        try:
            work(Team(board=board, rank=rank, writers=(0,)))
        except RuntimeError as error:
            faults[rank] = str(error)

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return faults


def test_ranks_meet_as_often_as_they_like_and_none_goes_ahead():
    done = [0, 0, 0]

    def work(me):
        for turn in range(1, 4):
            time.sleep(0.03 * me.rank)
            done[me.rank] = turn
            me.meet(3)
            assert min(done) >= turn

    assert meeting(work, 3) == {}
    assert done == [3, 3, 3]


def test_the_board_stays_until_nobody_looks_at_it_any_more(monkeypatch):
    monkeypatch.setattr(team, "POLL_S", 0.1)
    ended, looked = [], []

    class Board:
        def __init__(self, board, rank):
            self._board, self._rank = board, rank

        def add(self, key, number):
            looked.append((self._rank, bool(ended)))
            return self._board.add(key, number)

    def work(me):
        time.sleep(0.02 * (me.rank == 0))
        Team(board=Board(me.board, me.rank), rank=me.rank, writers=(0,)).meet(2)
        if me.leads:
            ended.append(True)

    assert meeting(work) == {}
    assert (1, False) in looked
    assert (1, True) not in looked


@pytest.mark.parametrize("signs", [True, False])
def test_who_gets_on_is_waited_for_and_who_hangs_is_not(monkeypatch, signs):
    monkeypatch.setattr(team, "STALLED_S", 0.4)

    def work(me):
        for _ in range(16 if me.rank else 0):
            time.sleep(0.05)
            if signs:
                me.get_on()
        me.meet(2)

    found = meeting(work)
    assert found == ({} if signs else {0: "1 of 2 ranks did not come, no sign for 0.4 s"})


def test_nobody_waits_for_rows_or_answers_of_others_in_a_collective(monkeypatch):
    """A collective ends at its time limit; here there is no group at all."""
    slow, reduced = [], []

    def step(*_):
        if threading.current_thread().name == "slow":
            time.sleep(0.2)
            slow.append(1)

    monkeypatch.setattr(evaluate, "_add_row", step)
    monkeypatch.setattr(evaluate, "ratio", lambda *_: "figures")
    monkeypatch.setattr(Masking, "of", lambda _: None)
    monkeypatch.setattr(dist, "all_reduce", lambda _: reduced.append(len(slow)))
    monkeypatch.setattr(measure, "answer", lambda *_: step() or "text")
    config = TrainConfig(evaluate=EvaluateConfig(prompts=("a", "b")))
    told = {}

    class Rows:
        records = torch.zeros(6, dtype=torch.int64)

        def __len__(self):
            return 6

        def batch(self, _):
            return {}

    def work(me):
        threading.current_thread().name = "quick" if me.rank else "slow"
        world = World(rank=me.rank, world_size=2)
        evaluate.held_out(torch.nn.Linear(1, 1), Rows(), world, "bf16", me)
        run = SimpleNamespace(world=world, config=config)
        told[me.rank] = measure._answers(run, me, None, None), len(slow)

    assert meeting(work) == {}
    assert reduced == [3, 3]
    assert told == {0: ({"a": "text", "b": "text"}, 5), 1: ({}, 5)}
