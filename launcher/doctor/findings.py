"""What ``baton doctor`` has found, one line each."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do when it is not well."""

    name: str
    is_well: bool
    found: str
    advice: str = ""

    def line(self) -> str:
        """As it is printed."""
        advice = f" ({self.advice})" if self.advice and not self.is_well else ""
        return f"  {'ok' if self.is_well else 'NO'} {self.name:<14} {self.found}{advice}"
