"""The model that a run starts from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from datasets import Dataset

from m3el_hf.errors import M3ELError
from m3el_hf.modeling.configuration_clipnd import ClipNDConfig
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor
from m3el_hf.sources import check_source, explain_hub_error


def start_model(
    base: str | None, head: str, rows: Dataset, seed: int = 0, template: str = "ND"
) -> tuple[ClipNDModel, ClipNDProcessor]:
    """Returns a model, on the accelerator where there is one, and its processor.

    Args:
        base: A CLIP checkpoint, a folder or a Hub id; None for a tiny model from scratch.
        head: The head of `ClipNDConfig`.
        rows: The training rows; a model from scratch learns its vocabulary from their texts.
        seed: Seeds the weights that do not come from ``base``.
        template: What an entity's text is made of, as `ClipNDProcessor` has it.

    Raises:
        M3ELError: If ``base`` is no CLIP checkpoint or cannot be had.
    """
    torch.manual_seed(seed)
    device = Accelerator().device
    if base is None:
        processor = ClipNDProcessor.tiny(_texts(rows), template=template)
        config = ClipNDConfig.tiny(len(processor.tokenizer), processor.tokenizer.eos_token_id, head=head)
        return ClipNDModel(config).to(device), processor
    check_source(base)
    try:
        model, processor = ClipNDModel.from_clip(base, head=head), ClipNDProcessor.from_pretrained(base)
        processor = ClipNDProcessor(processor.image_processor, processor.tokenizer, template=template)
    except (OSError, ValueError) as error:
        raise M3ELError(f"cannot start from {base}: {explain_hub_error(error)}") from error
    return model.to(device), processor


def _texts(rows: Dataset) -> Iterator[str]:
    for row in rows.select_columns(["mention", "context", "candidate_names", "candidate_descriptions"]):
        for text in (row["mention"], row["context"], *row["candidate_names"], *row["candidate_descriptions"]):
            if text:
                yield text
