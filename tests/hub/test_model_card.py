from __future__ import annotations

import yaml
from huggingface_hub import ModelCard

from m3el_hf import TASKS
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.measure import measure
from m3el_hf.evaluation.report import Setting
from m3el_hf.evaluation.report.contents import evaluation_report
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.hub.model_card import render_model_card

SETTING = Setting("test", "candidate set, as released", "expected rank", "0")


def test_the_card_holds_what_was_measured(model, processor, data):
    found = measure([ModelSystem("mine", model, processor)], data["test"])
    report = evaluation_report(
        "a run", found, SETTING, strong="mine", notes=["Read this."], provenance={"data": "mini"}
    )
    card = render_model_card(model, report, found, name="clipnd-mini", system="mine", base=None)
    assert "| task | chance |" in card.content and "## Measured" in card.content
    assert SETTING.line() in card.content
    assert "\n# clipnd-mini\n" in card.content
    assert "Read this." in card.content and "random weights" in card.content
    assert ("matching network" in card.content) == (model.config.head == "matching")
    assert "{{" not in card.content and "{%" not in card.content

    metadata = yaml.safe_load(card.content.split("---")[1])
    listed = {
        result["dataset"]["config"]: result["metrics"][0]["value"]
        for entry in metadata["model-index"]
        for result in entry["results"]
    }
    assert listed == {task: round(found.figures("mine", task)["accuracy"], 4) for task in TASKS}
    assert ModelCard(card.content).data.library_name == "transformers"


def test_a_fine_tuned_model_names_its_base(model, processor, data):
    found = evaluate([ModelSystem("mine", model, processor)], data["test"].select(range(3)))
    report = evaluation_report("a run", found, SETTING, strong="mine", provenance={"data": "mini"})
    card = render_model_card(model, report, found, name="x", system="mine", base="openai/clip-vit-base-patch32")
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert "from scratch" not in card.content
