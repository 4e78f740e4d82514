"""What a training run can be told, named as in transformers' TrainingArguments where that has a name for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TASKS


@dataclass
class TrainingArguments:
    """Settings of one training run; each is a flag of `m3el-hf train`.

    The metadata's help is the description of each field.

    Raises:
        M3ELError: If a value is out of its range.
    """

    output_dir: Path = field(default=Path("runs/train"), metadata={"help": "where checkpoints are written"})
    num_train_epochs: int = field(default=20, metadata={"help": "passes over the training rows, at most"})
    max_minutes: float | None = field(default=None, metadata={"help": "stop after this time; None for no limit"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "mentions a batch and process"})
    learning_rate: float = field(default=1e-5, metadata={"help": "peak of a linear warm-up and cosine decay"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.1, metadata={"help": "not applied to gains, biases and scales"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    tasks_per_mention: int = field(default=1, metadata={"help": "different tasks drawn for a mention and step, 1 to 9"})
    augment_pictures: bool = field(default=False, metadata={"help": "move, turn, scale and tint training pictures"})
    token_dropout: float = field(default=0.0, metadata={"help": "share of a training text's tokens that are hidden"})
    evaluations: int = field(default=10, metadata={"help": "validation runs, evenly spread; the best is kept"})
    lora: bool = field(default=False, metadata={"help": "train LoRA adapters of the towers, and the head whole"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    seed: int = field(default=0, metadata={"help": "seeds the order, the draws and new weights"})

    def __post_init__(self) -> None:
        """Checks the ranges."""
        self.output_dir = Path(self.output_dir)
        for name in ("num_train_epochs", "per_device_train_batch_size", "evaluations", "lora_rank"):
            if getattr(self, name) < 1:
                raise M3ELError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 1 <= self.tasks_per_mention <= len(TASKS):
            raise M3ELError(f"tasks_per_mention is {self.tasks_per_mention}: it must be 1 to {len(TASKS)}")
        if not 0 <= self.token_dropout < 1:
            raise M3ELError(f"token_dropout is {self.token_dropout}: it must be at least 0 and below 1")
        for name in ("learning_rate", "max_minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise M3ELError(f"{name} is {getattr(self, name)}: it must be above 0")
