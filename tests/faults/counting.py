"""What is counted of the faults that tests inject."""

from collections.abc import Callable


class Faults:
    """What one test has done to a run."""

    def __init__(self, record: Callable[[str, int], None]) -> None:
        self._record = record

    def injected(self, kind: str, lost: int = 0) -> None:
        """A fault, and how many steps, samples or runs were lost by it."""
        self._record(kind, lost)
