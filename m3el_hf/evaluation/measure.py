"""A model's figures beside what they must be read with: the baselines, and the model blind to mentions."""

from __future__ import annotations

from datasets import Dataset

from m3el_hf.data.collator import LinkingCollator
from m3el_hf.evaluation.baselines import BASELINES
from m3el_hf.evaluation.evaluator import ModelSystem, Table, average_mention, evaluate
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.modeling.processing_clipnd import ClipNDProcessor

MODEL, CONTROL = "model", "mention-blind control"


def measure(
    model: ClipNDModel, processor: ClipNDProcessor | LinkingCollator, rows: Dataset, *, progress: bool = False
) -> Table:
    """Measures the baselines, the model as `MODEL` and its mention-blind control as `CONTROL`, on the nine tasks.

    Args:
        model: The model.
        processor: Its processor, or a collator that holds it (and has cached the pictures).
        rows: Rows of `m3el_hf.data.schema.ROW_FEATURES`.
        progress: Show a progress bar.

    Raises:
        M3ELError: If there are no rows, or a score is NaN.
    """
    collator = processor if isinstance(processor, LinkingCollator) else LinkingCollator(processor)
    control = ModelSystem(CONTROL, model, collator, average_mention(model, collator, rows))
    return evaluate([*BASELINES, ModelSystem(MODEL, model, collator), control], rows, progress=progress)
