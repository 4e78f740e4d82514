"""The README of a model repository: how to use it, and what was measured."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.evaluation.report import Report
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.sources import is_hub_id, public_name

IN_CARD = ("accuracy", "topics", "seen", "deleaked")
"""The tables that a card shows; the report has all."""


def render_model_card(
    model: ClipNDModel, report: Report, evaluation: Evaluation, *, name: str, system: str, base: str | None
) -> ModelCard:
    """Renders the card.

    Args:
        model: The model.
        report: What is shown of what was measured, with the name of the ``data`` in its provenance.
        evaluation: What was measured.
        name: The model's name.
        system: The system that is this model; its figures go into the metadata.
        base: The checkpoint that training started from, or None if it started from scratch. A folder's name is said,
            and stands not in the metadata, where the Hub takes it for a repository.
    """
    data = str(report.provenance["data"])
    results = [
        EvalResult(
            task_type="entity-linking",
            task_name=f"Multimodal entity linking, {task}",
            dataset_type=data.split()[0],
            dataset_name=data,
            dataset_config=task,
            dataset_split=report.tables[0].setting.split,
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=round(figures["accuracy"], 4),
        )
        for task in evaluation.outcomes[system]
        if (figures := evaluation.figures(system, task)) is not None
    ]
    shown = replace(report, title="Measured", tables=tuple(one for one in report.tables if one.key in IN_CARD))
    card_data = ModelCardData(
        model_name=name,
        library_name="transformers",
        tags=["entity-linking", "multimodal", "m3el", "clipnd"],
        base_model=base if base and is_hub_id(base) and not Path(base).is_dir() else None,
        eval_results=results,
    )
    return ModelCard.from_template(
        card_data,
        template_str=files("m3el_hf.model_card").joinpath("template.md").read_text(encoding="utf-8"),
        title=name,
        head=model.config.head,
        parameters=model.num_parameters(),
        base=public_name(base) if base else "random weights",
        from_scratch=base is None,
        measured=shown.to_markdown(level=2),
    )
