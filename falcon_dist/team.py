"""The ranks that write a checkpoint together, and how they tell each other how far they are.

They speak through the run's key-value store, in JSON, from a thread beside the one that trains: a collective there
would mix with the training's own.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.distributed import Store  # type: ignore[attr-defined]

from falcon_dist.contract import UserError
from falcon_dist.world import World

SEEN_S: Final = 10.0
"""How long a file may take to be seen by the other hosts of a shared folder."""
POLL_S: Final = 0.01
LONGEST_POLL_S: Final = 0.2
STALLED_S: Final = 1800.0
"""How long ranks wait for others of which nothing is heard. The launcher ends them when a rank is gone, and outside of
training notices no sooner than this that nothing is done."""


class SaveError(Exception):
    """A checkpoint could not be written; the same few words on every rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """Rank 0 leads; the others write where they see its folder."""

    board: Store
    rank: int
    writers: tuple[int, ...]
    """Ranks that see rank 0's folder, itself included."""

    @property
    def leads(self) -> bool:
        """This rank makes the folder and commits."""
        return self.rank == 0

    def tell(self, save: str, name: str, value: Any) -> None:
        """Says something about a save."""
        self.board.set(f"save/{save}/{name}", json.dumps(value))

    def hear(self, save: str, name: str) -> Any:
        """What was said about a save, once it is said.

        Raises:
            SaveError: the save has failed in the meantime.
            RuntimeError: there was no sign of any rank for STALLED_S.
        """
        wanted, done = f"save/{save}/{name}", f"save/{save}/done"
        wait = _Wait(self.board)
        while not self.board.check([wanted]):
            # What is said before the end is there when the end is: it may have come since it was looked for.
            if self.board.check([done]) and not self.board.check([wanted]):
                self._check_done(self.board.get(done))
            wait.pause(f'"{name}" of the save of step {save} was not told')
        value = json.loads(self.board.get(wanted))
        if isinstance(value, dict) and "fault" in value:
            raise SaveError(value["fault"])
        return value

    def everyone_says(self, about: str, mine: str, world_size: int) -> list[str]:
        """What each rank says about something, in rank order; to be called by all ranks.

        Raises:
            RuntimeError: there was no sign of any rank for STALLED_S.
        """
        self.board.set(f"{about}/{self.rank}", json.dumps(mine))
        keys = [f"{about}/{rank}" for rank in range(world_size)]
        wait = _Wait(self.board)
        while not self.board.check(keys):
            wait.pause(f"not all of {world_size} ranks said anything about {about}")
        return [json.loads(self.board.get(key)) for key in keys]

    def get_on(self) -> None:
        """Says that this rank is at work on what others may wait for."""
        self.board.add("meeting/signs", 1)

    def meet(self, world_size: int) -> None:
        """Returns when all ranks have called it, however long that takes while signs come of some rank's work.

        For work whose time differs between ranks: a collective ends at its time limit, whatever the others do.

        Raises:
            RuntimeError: there was no sign of any rank for STALLED_S.
        """
        number = self.board.add("meeting/came", 1)
        wanted = -(-number // world_size) * world_size
        self._wait_for("came", wanted, world_size)
        self.board.add("meeting/left", 1)
        if self.leads:  # it may end now, and the board with it, at which others would still look
            self._wait_for("left", wanted, world_size)

    def _wait_for(self, what: str, wanted: int, world_size: int) -> None:
        wait, pause = _Wait(self.board), POLL_S
        while (here := self.board.add(f"meeting/{what}", 0)) < wanted:
            wait.pause(f"{wanted - here} of {world_size} ranks did not come", here, seconds=pause)
            pause = min(2 * pause, LONGEST_POLL_S)

    @staticmethod
    def _check_done(text: bytes) -> None:
        fault = json.loads(text).get("fault")
        raise SaveError(fault or "it was ended without this rank's part")


class _Wait:
    """For what the board does not have yet, as long as there are signs of any rank's work."""

    def __init__(self, board: Store) -> None:
        self._board = board
        self._heard: tuple[int, ...] = ()
        self._since = time.monotonic()

    def pause(self, missing: str, *moved: int, seconds: float = POLL_S) -> None:
        """Sleeps; ``moved`` are counts whose change is a sign as well."""
        told = (*moved, self._board.add("meeting/signs", 0))
        if told != self._heard:
            self._heard, self._since = told, time.monotonic()
        elif time.monotonic() - self._since > STALLED_S:
            raise RuntimeError(f"{missing}, no sign for {STALLED_S:g} s")
        time.sleep(seconds)


def gather(board: Store, world: World, root: Path) -> Team:
    """Finds out who sees rank 0's folder of checkpoints; to be called by all ranks.

    Raises:
        UserError: rank 0 cannot write there.
    """
    if world.is_main:
        token = secrets.token_hex(8)
        sign = root / f".seen-{token}"
        _try_to_write(root, sign)
        board.set("team/sign", sign.name)
        writers = [0, *(rank for rank in range(1, world.world_size) if board.get(f"team/{rank}") == b"yes")]
        board.set("team/writers", json.dumps(writers))
        sign.unlink()
    else:
        seen = _is_seen(root / board.get("team/sign").decode())
        board.set(f"team/{world.rank}", "yes" if seen else "no")
    found = json.loads(board.get("team/writers"))
    return Team(board=board, rank=world.rank, writers=tuple(found))


def _try_to_write(root: Path, sign: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        sign.write_text("")
    except OSError as error:
        raise UserError(f'checkpoint: cannot write in "{root}": {error.strerror}; nothing was trained') from error


def _is_seen(sign: Path) -> bool:
    deadline = time.monotonic() + SEEN_S
    if not sign.parent.is_dir():
        return False
    while time.monotonic() < deadline:
        with suppress(OSError):
            if sign.exists():
                return True
            list(sign.parent.iterdir())  # makes NFS look again
        time.sleep(POLL_S)
    return False
