"""What a soak came to, and how it is judged. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MOST_DIFFERENCE = 0.005
"""Share by which the final loss may differ from the undisturbed run's."""
RAREST_S = 240.0
"""At least one fault in so many of the seconds asked for: a soak without faults proves nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Soaked:
    """A disturbed run and one beside it that was not."""

    asked_s: float
    took_s: float
    faults: int
    """That were brought about, each of which ends an attempt and leaves a rank with the whole state."""
    attempts: int
    steps_lost: int
    exit_codes: tuple[int, int]
    """Here and below: of the disturbed run, of the other."""
    left: int
    """Processes and listening sockets of both."""
    losses: tuple[float, float]
    same_weights: bool
    alarm: str
    """What was noticed of the undisturbed run; empty: nothing."""
    load: float
    goodput: float | None

    @property
    def difference(self) -> float:
        """Of the losses, as a share of the undisturbed run's."""
        return abs(self.losses[0] - self.losses[1]) / self.losses[1]

    def wrong(self) -> list[str]:
        """What was not as it has to be."""
        least = int(self.asked_s / RAREST_S)
        checks = (
            (self.exit_codes == (0, 0), f"exit codes {self.exit_codes[0]} and {self.exit_codes[1]}"),
            (self.left == 0, f"{self.left} processes or sockets left"),
            (not self.alarm, f"a false alarm in the undisturbed run: {self.alarm}"),
            (self.faults >= least, f"{self.faults} faults only, not {least}"),
            (self.attempts == self.faults + 1, f"{self.attempts} attempts with {self.faults} faults"),
            (self.steps_lost == 0, f"{self.steps_lost} steps lost where a survivor had them"),
            (self.difference <= MOST_DIFFERENCE, f"final losses differ by {100 * self.difference:.3f}%"),
            (self.same_weights, "other weights than those of the undisturbed run"),
        )
        return [why for good, why in checks if not good]

    def told(self) -> str:
        """In a line."""
        parts = (
            f"{self.faults} faults in {self.took_s / 60:.0f} min",
            f"{self.attempts} attempts",
            f"exit codes {self.exit_codes[0]} and {self.exit_codes[1]}",
            f"{self.left} left",
            f"final loss {self.losses[0]:.6f}, undisturbed {self.losses[1]:.6f}, {100 * self.difference:.3f}% apart",
            f"{'the same' if self.same_weights else 'other'} weights",
            f"false alarms in the undisturbed run: {self.alarm or 'none'} (load {self.load:.1f})",
            f"steps lost {self.steps_lost}, goodput {self.goodput}",
        )
        wrong = self.wrong()
        return f"{'; '.join(parts)}: {'failed: ' + '; '.join(wrong) if wrong else 'passed'}"
