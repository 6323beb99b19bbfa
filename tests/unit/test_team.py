import pytest
from torch.distributed import HashStore

from falcon_dist.team import SaveError, Team


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


def test_an_end_that_comes_while_it_is_looked_for_is_heard():
    assert Team(board=Late("{}"), rank=1, writers=(0, 1)).hear("7", "done") == {}


def test_what_will_never_be_said_is_not_waited_for():
    team = Team(board=Late('{"fault": "No space left on device"}'), rank=1, writers=(0, 1))
    with pytest.raises(SaveError, match="No space left"):
        team.hear("7", "folder")
