"""The README of a model repository: how to use it, and what was measured."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from m3el_hf.evaluation.run_report import RunReport
from m3el_hf.modeling.modeling_clipnd import ClipNDModel
from m3el_hf.sources import is_hub_id, public_name


def render_model_card(model: ClipNDModel, report: RunReport, *, name: str, system: str, base: str | None) -> ModelCard:
    """Renders the card.

    Args:
        model: The model.
        report: What was measured.
        name: The model's name.
        system: The row of ``report.table`` that is this model; its figures go into the metadata.
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
            dataset_split=str(report.provenance["split"]),
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=round(cell["accuracy"], 4),
        )
        for task, cell in report.table.cells[system].items()
    ]
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
        table=report.to_markdown(),
        notes=report.notes,
        provenance=report.provenance,
    )
