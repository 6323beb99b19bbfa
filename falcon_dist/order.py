"""Which row is trained when, as pure functions: (seed, epoch, index) -> row, and step -> rows.

The whole stream of rows is fixed by the seed. Step s owns the stream's places s*B to (s+1)*B-1 (B is the
global batch), whatever the number of ranks; to resume, the step is all that must be known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

from falcon_dist.agreement import check_numbers
from falcon_dist.config import LoopConfig
from falcon_dist.contract import UserError

PADDING = -1
"""Stands for a row of nothing: every position masked, no loss."""

_MASK64 = (1 << 64) - 1


def permuted(index: int, *, size: int, seed: int, epoch: int) -> int:
    """Place ``index`` of a random permutation of range(size), without holding the permutation.

    A four-round Feistel network over the next even power of two, walked until it lands inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    while True:
        index = _feistel(index, half, keys)
        if index < size:
            return index


def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=32).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8))


def _feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The arithmetic of a run: how rows, ranks and steps fit together."""

    num_rows: int
    """Rows of the packed training set."""
    world_size: int
    micro_batch: int
    grad_accum: int
    total_steps: int
    total_rows: int
    """Rows trained over the whole run; what is missing to a full last step is padding."""
    seed: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.grad_accum * self.world_size

    @property
    def padding_rows(self) -> int:
        return self.total_steps * self.global_batch - self.total_rows

    @property
    def unseen_rows(self) -> int:
        return max(0, self.num_rows - self.total_rows)

    def row_at(self, place: int) -> int:
        """The row at one place of the stream; PADDING behind its end."""
        if place >= self.total_rows:
            return PADDING
        epoch, index = divmod(place, self.num_rows)
        return permuted(index, size=self.num_rows, seed=self.seed, epoch=epoch)

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0), over all ranks."""
        start = step * self.global_batch
        return [self.row_at(place) for place in range(start, start + self.global_batch)]

    def rows_of_rank(self, step: int, rank: int) -> list[int]:
        """One rank's rows of a step: of every run of world_size micro-batches, the rank-th."""
        rows = self.rows_of_step(step)
        firsts = range(rank * self.micro_batch, len(rows), self.world_size * self.micro_batch)
        return [row for first in firsts for row in rows[first : first + self.micro_batch]]

    def epoch_at(self, step: int) -> float:
        """How many times the data was seen once ``step`` steps are done."""
        return min(step * self.global_batch, self.total_rows) / self.num_rows


def plan_schedule(loop: LoopConfig, *, num_rows: int, world_size: int, seed: int) -> Schedule:
    """Fits rows, ranks and batch settings together.

    Raises:
        UserError: the global batch cannot be divided over the ranks, or a count is not positive.
    """
    _check_counts(loop, num_rows)
    grad_accum = _grad_accum(loop, world_size)
    batch = loop.micro_batch * grad_accum * world_size
    total_rows = math.ceil(round(loop.epochs * num_rows, 6))  # 2.2 * 50 is a little more than 110
    total_steps = math.ceil(total_rows / batch)
    if loop.max_steps is not None:
        total_steps = loop.max_steps
        total_rows = total_steps * batch
    return Schedule(
        num_rows=num_rows,
        world_size=world_size,
        micro_batch=loop.micro_batch,
        grad_accum=grad_accum,
        total_steps=total_steps,
        total_rows=total_rows,
        seed=seed,
    )


def _check_counts(loop: LoopConfig, num_rows: int) -> None:
    if num_rows < 1:
        raise UserError("data: no training row is left; lower data.eval_share or give more text")
    check_numbers({"loop": dataclasses.asdict(loop)})


def _grad_accum(loop: LoopConfig, world_size: int) -> int:
    if loop.global_batch is None:
        return loop.grad_accum or 1
    rows = loop.micro_batch * world_size
    accum, rest = divmod(loop.global_batch, rows)
    if rest or (loop.grad_accum is not None and loop.grad_accum != accum):
        wanted = f" x grad_accum {loop.grad_accum}" if loop.grad_accum is not None else ""
        raise UserError(
            f"loop.global_batch does not fit micro_batch {loop.micro_batch} x {world_size} ranks{wanted}: "
            f'"{loop.global_batch}"; make it a multiple of {rows}' + (" or leave grad_accum out" if wanted else "")
        )
    return accum
