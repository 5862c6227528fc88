"""Whether a run is well: steps whose gradient is not finite, and signs of collapse."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import RunConfig
from .disk import replace_text
from .errors import StartAgain, UserError

ROLLBACKS = "rollbacks.json"
SEED_STRIDE = 1_000_003
"""Added to the seed of the data's order with each rollback"""
IN_A_ROW = 3
"""Logged steps after which a sign of collapse is believed"""


@dataclass
class Skipped:
    """Steps that were left out, over the whole run."""

    total: int = 0
    """Because the gradient, or the loss, was not finite"""
    scaling: int = 0
    """Because fp16's loss scale was too large for a finite loss: it is halved then"""
    in_a_row: int = 0
    """Of `total`, since the last step that was taken"""


class Divergence:
    """Counts skipped steps; when they are too many, ends the run or has it go back to its last checkpoint."""

    def __init__(self, config: RunConfig, saved: dict[str, Any]) -> None:
        """saved: what `state` was in the checkpoint that the run goes on from."""
        self._config, self._rollbacks = config, rollbacks(config.run_dir)
        self.skipped = Skipped(**saved.get("skipped", {}))

    @property
    def suspicious(self) -> bool:
        """Whether the next step's gradients are worth a closer look."""
        return self.skipped.in_a_row > 0 or self._config.max_skipped_steps == 0

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"skipped": vars(self.skipped)}

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {"skipped/not_finite": self.skipped.total, "skipped/loss_scaling": self.skipped.scaling}

    def taken(self) -> None:
        """A step was taken."""
        self.skipped.in_a_row = 0

    def left_out(self, scaled: bool) -> bool:
        """A step was not taken. scaled: because of fp16's loss scale alone. Returns whether the run must end."""
        if scaled:
            self.skipped.scaling += 1
            return False
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        return self.skipped.in_a_row > self._config.max_skipped_steps

    def give_up(self, step: int, reports: Path, can_go_back: bool) -> None:
        """Raise StartAgain to go on from the last checkpoint in another order, or UserError to end the run."""
        what = f"the loss or its gradient is not finite at step {step} ({self.skipped.in_a_row} steps in a row)"
        done = self._rollbacks
        if self._config.on_divergence == "rollback" and can_go_back:
            if len(done) < self._config.max_rollbacks:
                # Every rank writes the same, and may be killed while it does: the first one ends the others.
                replace_text(self._config.run_dir / ROLLBACKS, json.dumps([*done, step]))
                raise StartAgain(f"{what}; going back to the last checkpoint, with the data in another order")
            what += f" after {len(done)} rollbacks"
        raise UserError(f"{what}; its samples, losses and gradient norms are in {reports}")


def rollbacks(run_dir: Path) -> list[int]:
    """The steps at which the run has gone back to a checkpoint."""
    path = run_dir / ROLLBACKS
    try:
        return [int(step) for step in json.loads(path.read_text())] if path.is_file() else []
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: cannot be read; delete it to start counting rollbacks again") from None


class CollapseDetector:
    """Looks at logged numbers for representations that have become the same for every sample."""

    def __init__(self, config: RunConfig) -> None:
        self._prototypes = {
            name: objective.prototypes
            for name, objective in config.objectives.active().items()
            if hasattr(objective, "prototypes")
        }
        self._seen: dict[str, int] = {}

    def look(self, entry: dict[str, Any]) -> list[str]:
        """A logged step; the warnings that it gives rise to, each once as long as its sign lasts."""
        signs = dict(sign for key, value in entry.items() for sign in self._signs(key, value))
        self._seen = {sign: self._seen.get(sign, 0) + 1 for sign in signs}
        return [signs[sign] for sign, count in self._seen.items() if count == IN_A_ROW]

    def _signs(self, key: str, value: Any) -> list[tuple[str, str]]:
        objective, _, name = key.partition("/")
        if name == "teacher_entropy" and objective in self._prototypes:
            most = math.log(self._prototypes[objective])
            if value < 0.01 * most:
                return [(key, f"{key} is {value:.3f} of {most:.1f} nats: the teacher gives every sample one prototype")]
            if value > 0.999 * most:
                return [(key, f"{key} is {value:.3f} of {most:.1f} nats: the teacher no longer prefers any prototype")]
        if name.endswith("feature_std") and value < 0.05:
            return [(key, f"{key} is {value:.3f}: features hardly differ between samples (1 is the most they can)")]
        if name == "logit_scale" and value < 1:
            return [(key, f"{key} is {value:.3f}: images and captions are no longer told apart")]
        return []
