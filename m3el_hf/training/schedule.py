"""How far a run is, by steps or by time, and what follows from that."""

from __future__ import annotations

import math
import time

from m3el_hf.training.arguments import TrainingArguments


class Clock:
    """Counts steps and time, whichever ends the run first.

    Args:
        arguments: The run's settings.
        steps_per_epoch: None where nobody knows, as with a streamed dataset.

    Attributes:
        step: Steps taken.
        seconds: What they took, before a resume too; the same in all processes.
        total_steps: How many there will be; infinite where time alone ends the run.
    """

    def __init__(self, arguments: TrainingArguments, steps_per_epoch: int | None) -> None:
        self._arguments = arguments
        by_epochs = math.inf if steps_per_epoch is None else steps_per_epoch * arguments.num_train_epochs
        self.total_steps = min(by_epochs, arguments.max_steps or math.inf)
        self._limit = arguments.max_minutes * 60 if arguments.max_minutes else math.inf
        self.start()

    def start(self, step: int = 0, seconds: float = 0.0) -> None:
        """Starts to count at a step and a time."""
        self.step, self.seconds, self._began = step, seconds, time.monotonic() - seconds
        self._done = {every: self._count(every) for every in ("eval_steps", "save_steps", "logging_steps")}

    def elapsed(self) -> float:
        """Seconds by this process's own watch."""
        return time.monotonic() - self._began

    def advance(self, seconds: float) -> None:
        """Counts a step, at the time that all processes agree on."""
        self.step, self.seconds = self.step + 1, seconds

    def share(self, step: int) -> float:
        """The share of the run that is done at a step, or by now if time is the shorter."""
        return min(1.0, max(step / self.total_steps, self.seconds / self._limit))

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        return self.share(self.step)

    @property
    def seconds_allowed(self) -> float:
        """What the time limit leaves; infinite where there is none."""
        return self._limit - self.seconds

    @property
    def rate(self) -> float:
        """What learning rates are multiplied by: a linear warm-up over steps, then the schedule over the run."""
        arguments = self._arguments
        falls = {"cosine": 0.5 * (1 + math.cos(math.pi * self.progress)), "linear": 1 - self.progress, "constant": 1.0}
        return min(1.0, (self.step + 1) / max(1, arguments.warmup_steps)) * falls[arguments.lr_scheduler_type]

    @property
    def seconds_left(self) -> float:
        """As it goes until now."""
        return self.seconds * (1 / self.progress - 1) if self.progress else math.inf

    def is_due(self, every: str) -> bool:
        """Whether it is time again for what happens every so many steps, or share of the run; True once each time."""
        count = self._count(every)
        due, self._done[every] = count > self._done[every], count
        return due

    def _count(self, every: str) -> int:
        interval = getattr(self._arguments, every)
        return int(self.progress / interval + 1e-9) if interval < 1 else int(self.step // interval)
