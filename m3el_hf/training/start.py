"""The model that a run starts from, and what of it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from m3el_hf.errors import M3ELError
from m3el_hf.modeling.configuration_clipnd import ClipNDConfig, named_branches
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.sources import adapter_base, check_source, explain_hub_error
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.lora import add_lora


def start_model(
    base: str | None,
    head: str | None,
    rows: Dataset,
    seed: int = 0,
    template: str | None = None,
    **settings: Any,
) -> tuple[ClipNDModel, ClipNDProcessor]:
    """Returns a model and its processor.

    Args:
        base: A CLIP checkpoint or a saved `ClipNDModel`, a folder or a Hub id; None for a tiny model from scratch.
        head: The head of `ClipNDConfig`; None for that of a saved model, else ``"clip"``.
        rows: The training rows; a model from scratch learns its vocabulary from their texts.
        seed: Seeds the weights that do not come from ``base``.
        template: What an entity's text is made of, as `ClipNDProcessor` has it; None for that of a saved model, else
            ``"ND"``.
        **settings: Other arguments of `ClipNDConfig`. A saved model has its architecture, and takes weights of losses.

    Raises:
        M3ELError: If ``base`` is no such checkpoint or cannot be had, or a setting is not for this model.
    """
    torch.manual_seed(seed)
    settings |= {} if head is None else {"head": head}
    if base is None:
        processor = ClipNDProcessor.tiny(_texts(rows), template=template or "ND")
        try:
            config = ClipNDConfig.tiny(len(processor.tokenizer), processor.tokenizer.eos_token_id, **settings)
        except ValueError as error:
            raise M3ELError(str(error)) from error
        model = ClipNDModel(config)
    else:
        model, processor = _load(check_source(base), template, settings)
    for name in MATCHING_ONLY:
        if name in settings and model.config.head != "matching":
            raise M3ELError(
                f"{name} is for the matching head, and this model has the head {model.config.head}: choose head "
                "matching, or leave it out"
            )
    return model, processor


MATCHING_ONLY = ("matching_direction", "matching_branches", "contrastive_weight", "branch_weight")


def _load(base: str, template: str | None, settings: dict[str, Any]) -> tuple[ClipNDModel, ClipNDProcessor]:
    try:
        if adapter_base(base) is not None:
            raise M3ELError(f"{base} holds adapters alone: save what merge_and_unload() returns, and start from that")
        kind = PretrainedConfig.get_config_dict(base)[0].get("model_type")
        processor = ClipNDProcessor.from_pretrained(base)
        if kind == ClipNDConfig.model_type:
            model = ClipNDModel.from_pretrained(base)
        else:
            model = ClipNDModel.from_clip(base, **settings)
        if "matching_branches" in settings:  # by the names that the configuration has
            named = named_branches(settings["matching_branches"], model.config.matching_direction)
            settings = settings | {"matching_branches": named}
    except M3ELError:
        raise
    except (OSError, ValueError) as error:
        raise M3ELError(f"cannot start from {base}: {explain_hub_error(error)}") from error
    for name, value in settings.items():
        own = getattr(model.config, name)
        if own != value and not name.endswith("_weight"):
            raise M3ELError(f"{base} has the {name} {own}, not {value}: leave {name} out, or start from a CLIP")
        setattr(model.config, name, value)
    length, template = processor.max_text_length, template or processor.template
    return model, ClipNDProcessor(processor.image_processor, processor.tokenizer, length, template)


def _texts(rows: Dataset) -> Iterator[str]:
    for row in rows.select_columns(["mention", "context", "candidate_names", "candidate_descriptions"]):
        for text in (row["mention"], row["context"], *row["candidate_names"], *row["candidate_descriptions"]):
            if text:
                yield text


def make_trainable(model: ClipNDModel, arguments: TrainingArguments) -> ClipNDModel | PeftModel:
    """Freezes, adapts and compiles a model as a run wants it, in place; with ``lora`` returns what PEFT makes of it."""
    for tower in {"none": (), "both": ("text", "vision"), "text": ("text",), "image": ("vision",)}[arguments.freeze]:
        getattr(model.clip, f"{tower}_model").requires_grad_(False)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arguments.torch_compile:
        model.clip.text_model.compile()
        model.clip.vision_model.compile()
    return add_lora(model, rank=arguments.lora_rank) if arguments.lora else model


def make_optimizer(model: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Returns AdamW over what is trained: gains, biases and scales without weight decay, the head at its own rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((not name.startswith("clip."), parameter.ndim >= 2), []).append(parameter)
    rates = {False: arguments.learning_rate, True: arguments.head_learning_rate or arguments.learning_rate}
    described = [
        {
            "params": parameters,
            "lr": rates[is_head],
            "initial_lr": rates[is_head],
            "weight_decay": arguments.weight_decay if is_matrix else 0.0,
        }
        for (is_head, is_matrix), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, eps=arguments.adam_epsilon)


def base_of(model: Any) -> ClipNDModel:
    """The model inside PEFT's wrapper, with its adapters; a model that has none is returned as it is."""
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return found


def without_adapters(model: Any) -> ClipNDModel:
    """Merges adapters into the weights, in place; a model that has none is returned as it is."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
