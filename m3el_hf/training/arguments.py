"""What a training run can be told, named as in transformers' TrainingArguments where that has a name for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from m3el_hf.errors import M3ELError
from m3el_hf.training.distributions import parse_stages, parse_templates

CHOICES = {
    "lr_scheduler_type": ("cosine", "linear", "constant"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "report_to": ("none", "tensorboard", "wandb"),
    "freeze": ("none", "text", "image", "both"),
}

COUNTS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_rank",
    "mine_negatives", "negatives_per_mention", "save_total_limit", "early_stopping_patience", "logging_steps",
)  # fmt: skip
POSITIVE = ("learning_rate", "head_learning_rate", "max_minutes", "eval_steps", "save_steps", "max_grad_norm")


def _says(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingArguments:
    """Settings of one training run; each is a flag of `m3el-hf train` and a key of its YAML file.

    The metadata's help is the description of each field. A share is of the whole run: 0.1 is every tenth of it.

    Raises:
        M3ELError: If a value is out of its range.
    """

    output_dir: Path = _says(Path("runs/train"), "where checkpoints, logs and plots are written")
    seed: int = _says(0, "seeds the order, the draws and new weights")
    # How long, and how large a batch.
    num_train_epochs: int = _says(20, "passes over the training rows, at most")
    max_steps: int | None = _says(None, "optimiser steps, at most; a streamed dataset needs it")
    max_minutes: float | None = _says(None, "stop after this time; None for no limit")
    per_device_train_batch_size: int = _says(64, "mentions that a process encodes at once")
    gradient_accumulation_steps: int = _says(1, "such parts a step; all their entities are negatives of all mentions")
    dataloader_num_workers: int = _says(0, "processes that prepare batches ahead")
    # Optimisation.
    learning_rate: float = _says(1e-5, "peak of the learning rate")
    head_learning_rate: float | None = _says(None, "that of the head, where it differs")
    lr_scheduler_type: str = _says(
        "cosine", "how it falls after the warm-up: " + ", ".join(CHOICES["lr_scheduler_type"])
    )
    warmup_steps: int = _says(50, "steps of linear warm-up")
    weight_decay: float = _says(0.1, "not applied to gains, biases and scales")
    adam_epsilon: float = _says(1e-8, "epsilon of AdamW")
    max_grad_norm: float = _says(1.0, "gradients are clipped to this norm")
    mixed_precision: str | None = _says(None, "no, bf16 or fp16, scores in fp32; None as accelerate is configured")
    torch_compile: bool = _says(False, "compile the towers")
    gradient_checkpointing: bool = _says(False, "compute activations again in the backward pass, to save memory")
    # What is trained.
    freeze: str = _says("none", "towers that stay as they are: " + ", ".join(CHOICES["freeze"]))
    lora: bool = _says(False, "train LoRA adapters of the towers, and the head whole")
    lora_rank: int = _says(8, "rank of the adapters")
    # Modality augmentation and negatives.
    tasks: str = _says("uniform", "tasks to draw: uniform, weights (t2t=1,it2it=2), or stages (uniform; 0.5: it2it=1)")
    tasks_per_mention: int = _says(1, "different tasks drawn for a mention and step, 1 to 9")
    entity_text: str | None = _says(
        None, "draw an entity's text, as in N=1,D=1,ND=2; None for the processor's template"
    )
    augment_pictures: bool = _says(False, "move, turn, scale and tint training pictures")
    token_dropout: float = _says(0.0, "share of a training text's tokens that are hidden")
    mine_negatives: int | None = _says(None, "look for hard negatives every so many epochs")
    negatives_per_mention: int = _says(4, "hard negatives that a mention brings along")
    # Validation, checkpoints, logs.
    eval_steps: float = _says(0.1, "validate every so many steps, or share of the run if below 1; the best is kept")
    save_steps: float = _says(0.1, "write a checkpoint every so many steps, or share of the run")
    save_total_limit: int = _says(2, "checkpoints that are kept, besides the best")
    early_stopping_patience: int | None = _says(None, "stop after so many validation runs without a better MRR")
    logging_steps: int = _says(10, "write losses every so many steps")
    report_to: str = _says("none", "also log to: " + ", ".join(CHOICES["report_to"]))
    resume: bool = _says(False, "continue from the last checkpoint in output_dir")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        self.output_dir = Path(self.output_dir)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices and not (name == "mixed_precision" and self.mixed_precision is None):
                raise M3ELError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise M3ELError(f"report_to is {self.report_to}, which is not installed: pip install {self.report_to}")
        for name in COUNTS:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise M3ELError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise M3ELError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("warmup_steps", "weight_decay", "adam_epsilon", "dataloader_num_workers"):
            if not getattr(self, name) >= 0:
                raise M3ELError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not 1 <= self.tasks_per_mention <= 9:
            raise M3ELError(f"tasks_per_mention is {self.tasks_per_mention}: it must be 1 to 9")
        if not 0 <= self.token_dropout < 1:
            raise M3ELError(f"token_dropout is {self.token_dropout}: it must be at least 0 and below 1")
        if self.lora and self.freeze != "none":
            raise M3ELError("lora freezes the towers' own weights by itself: leave freeze out")
        parse_stages(self.tasks)
        parse_templates(self.entity_text)

    @property
    def batch_size(self) -> int:
        """Mentions of a step and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each setting."""
        return {one.name: one.default for one in fields(cls)}


MODEL_CHOICES = {
    "head": ("clip", "matching", "pooled"),
    "matching_direction": ("unidirectional", "bidirectional"),
    "template": ("N", "D", "ND"),
}
"""As `ClipNDConfig` and `ClipNDProcessor` have them, which are slow to import."""

MODEL_BRANCHES = ("text", "image", "cross", "text_image", "image_text")
"""Of the matching head, in either direction; ``cross`` stands for the cross-modal ones of both."""

MODEL_SETTINGS = (
    "matching_direction", "matching_branches", "contrastive_weight", "branch_weight", "entity_to_mention_weight",
)  # fmt: skip
"""Settings that are arguments of `ClipNDConfig`, beside the head."""


@dataclass
class RunArguments(TrainingArguments):
    """All that `m3el-hf train` can be told: the data, the model to start from, the training, and where to publish.

    A setting of the model that is None is what a saved model has, else the default of `ClipNDConfig`.

    Raises:
        M3ELError: If a value is out of its range, or there is no data.
    """

    data: str = _says("", "folder or Hub id of a built dataset; it is required")
    base: str | None = _says(
        None, "a CLIP or a saved model to start from, folder or Hub id; None for a tiny one from scratch"
    )
    head: str | None = _says(None, f"how pairs are scored: {', '.join(MODEL_CHOICES['head'])}; clip for a new model")
    template: str | None = _says(None, "an entity's text: N, D or ND, name, description or both; ND for a new model")
    matching_direction: str | None = _says(
        None, f"how the matching head crosses modalities: {', '.join(MODEL_CHOICES['matching_direction'])}"
    )
    matching_branches: str | None = _says(
        None, f"branches of the matching head that are not left out, as in text,cross: {', '.join(MODEL_BRANCHES)}"
    )
    contrastive_weight: float | None = _says(None, "weight of the matching head's intra-modal loss")
    branch_weight: float | None = _says(None, "weight of the loss of each branch of the matching head")
    entity_to_mention_weight: float | None = _says(None, "weight of the loss from each gold to the mentions")
    push_to_hub: str | None = _says(None, "publish the best model, with its card, as user/name on the Hub")
    hub_every_epochs: int | None = _says(None, "publish every so many epochs too, not at the end alone")
    private: bool = _says(False, "make a new repository private")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        if not self.data:
            raise M3ELError("there is no data: pass --data, or put data into the YAML file")
        for name, choices in MODEL_CHOICES.items():
            if getattr(self, name) not in (None, *choices):
                raise M3ELError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.matching_branches is not None and not set(self._branches) <= set(MODEL_BRANCHES):
            raise M3ELError(
                f"matching_branches is {self.matching_branches!r}: give some of {', '.join(MODEL_BRANCHES)}, parted by "
                "commas"
            )
        for name in MODEL_SETTINGS:
            if name.endswith("_weight") and getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise M3ELError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.hub_every_epochs is not None and self.hub_every_epochs < 1:
            raise M3ELError(f"hub_every_epochs is {self.hub_every_epochs}: it must be at least 1")
        if self.push_to_hub is None and (self.hub_every_epochs or self.private):
            name = "hub_every_epochs" if self.hub_every_epochs else "private"
            raise M3ELError(f"{name} is for a run that is published: set push_to_hub, or leave it out")

    @property
    def training(self) -> TrainingArguments:
        """What the loop is told."""
        return TrainingArguments(**{one.name: getattr(self, one.name) for one in fields(TrainingArguments)})

    @property
    def model_settings(self) -> dict[str, Any]:
        """What the model's configuration is told, beside the head."""
        told = {name: getattr(self, name) for name in MODEL_SETTINGS if getattr(self, name) is not None}
        return told | {"matching_branches": self._branches} if "matching_branches" in told else told

    @property
    def _branches(self) -> list[str]:
        return [name.strip() for name in (self.matching_branches or "").split(",")]
