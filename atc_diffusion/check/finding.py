"""What one part of the check found."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was tried, what is wrong with it (None: nothing), and what was measured."""

    subject: str
    problem: str | None = None
    note: str = ""

    def __str__(self) -> str:
        state = "ok   " if self.problem is None else "WRONG"
        return f"{state} {self.subject}{': ' if self.problem or self.note else ''}{self.problem or self.note}"


def find(subject: str, probe: Callable[[], float], tolerance: float) -> Finding:
    """A finding about a `probe` that measures an error; whatever it raises is a problem, too."""
    try:
        error = probe()
    except Exception as problem:  # whatever a driver, a compiler or a missing operation raises
        lines = str(problem).strip().splitlines() or [""]
        return Finding(subject, f"{type(problem).__name__}: {lines[0]}")
    if error <= tolerance:  # false for NaN
        return Finding(subject, note=f"error {error:.1e}")
    return Finding(subject, f"error {error:.1e}, more than {tolerance:g}")
