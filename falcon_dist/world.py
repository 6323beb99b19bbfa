"""World: who this rank is among the others, read once from the environment and checked.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from falcon_dist import contract
from falcon_dist.contract import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A rank's coordinates, in torchrun's terms."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that commits checkpoints and speaks for the run."""
        return self.rank == 0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """Reads the coordinates; none at all is a world of one.

        Raises:
            UserError: a coordinate is missing, no number, or outside its range.
        """
        if contract.RANK not in env and contract.WORLD_SIZE not in env:
            return cls()
        world = cls(
            rank=_number(env, contract.RANK),
            world_size=_number(env, contract.WORLD_SIZE),
            local_rank=_number(env, contract.LOCAL_RANK),
            local_world_size=_number(env, contract.LOCAL_WORLD_SIZE),
            node_rank=int(env.get(contract.GROUP_RANK, "0")),
        )
        _check(contract.RANK, world.rank, world.world_size)
        _check(contract.LOCAL_RANK, world.local_rank, world.local_world_size)
        return world


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdecimal():
        raise UserError(f'environment: {name} must be a whole number: "{text}"; start ranks with falcon-launch')
    return int(text)


def _check(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise UserError(f'environment: {name} must be from 0 to {size - 1}: "{value}"')
