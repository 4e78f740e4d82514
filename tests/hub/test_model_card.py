from __future__ import annotations

import yaml
from huggingface_hub import ModelCard

from m3el_hf.evaluation.baselines import BASELINES
from m3el_hf.evaluation.evaluator import ModelSystem, evaluate
from m3el_hf.evaluation.run_report import RunReport
from m3el_hf.hub.model_card import render_model_card


def test_the_card_holds_what_was_measured(model, processor, data):
    table = evaluate([*BASELINES, ModelSystem("mine", model, processor)], data["test"])
    provenance = {"data": "mini", "split": "test", "seed": 0}
    report = RunReport("a run", table, provenance, notes=["Read this."])
    card = render_model_card(model, report, name="clipnd-mini", system="mine", base=None)
    assert report.to_markdown() in card.content
    assert "\n# clipnd-mini\n" in card.content
    assert "Read this." in card.content and "random weights" in card.content
    assert ("matching network" in card.content) == (model.config.head == "matching")
    assert "{{" not in card.content and "{%" not in card.content

    metadata = yaml.safe_load(card.content.split("---")[1])
    found = {
        result["dataset"]["config"]: result["metrics"][0]["value"]
        for entry in metadata["model-index"]
        for result in entry["results"]
    }
    assert found == {task: round(cell["accuracy"], 4) for task, cell in table.cells["mine"].items()}
    assert ModelCard(card.content).data.library_name == "transformers"


def test_a_fine_tuned_model_names_its_base(model, processor, data):
    table = evaluate([ModelSystem("mine", model, processor)], data["test"].select(range(3)))
    report = RunReport("a run", table, {"data": "mini", "split": "test"})
    card = render_model_card(model, report, name="x", system="mine", base="openai/clip-vit-base-patch32")
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert "from scratch" not in card.content
