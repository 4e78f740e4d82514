from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from m3el_hf import __version__
from m3el_hf.data.card import render_dataset_card
from m3el_hf.data.configs import configs
from m3el_hf.data.schema import ROW_FEATURES
from m3el_hf.data.store import build
from m3el_hf.tasks import TASKS
from tests.conftest import instance, write_release


@pytest.fixture
def released(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    for split, size in (("train", 5), ("test", 3)):
        rows = [instance(number, topic="books", images=False) for number in range(size)]
        write_release(folder, rows, f"books_{split}.json")
    return folder


def card_of(folder: Path | None, reader: str = "m3el", **options: Any) -> DatasetCard:
    """The card that a build in a folder of its own writes."""
    with tempfile.TemporaryDirectory() as output:
        return DatasetCard(render_dataset_card(build(reader, folder, Path(output) / "m3el", progress=False, **options)))


def configs_of(card: DatasetCard) -> dict[str, dict[str, Any]]:
    return {entry["config_name"]: entry for entry in card.data.to_dict()["configs"]}


def test_there_is_a_config_for_each_view_that_has_rows(released):
    assert list(configs_of(card_of(released))) == list(configs(["books"], knowledge_base=False))


def test_everything_is_the_default(released):
    assert [name for name, entry in configs_of(card_of(released)).items() if entry.get("default")] == ["all"]


def test_configs_name_only_splits_that_have_rows(released):
    found = configs_of(card_of(released))
    assert found["all"]["data_files"] == [
        {"split": "train", "path": "data/*/train-*.parquet"},
        {"split": "test", "path": "data/*/test-*.parquet"},
    ]
    assert found["books"]["data_files"][0]["path"] == "data/books/train-*.parquet"
    assert found["entities"]["data_files"] == [{"split": "train", "path": "entities/*.parquet"}]


def test_a_topic_has_its_own_splits(released):
    write_release(released, [instance(9, topic="person", images=False)], "person_validation.json")
    found = configs_of(card_of(released))
    assert [one["split"] for one in found["all"]["data_files"]] == ["train", "validation", "test"]
    assert [one["split"] for one in found["person"]["data_files"]] == ["validation"]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_choice_of_columns(released, task):
    entry = configs_of(card_of(released))[task]
    assert tuple(entry["columns"]) == TASKS[task].columns
    folder = "text" if task == "t2t" else "data"
    assert all(one["path"].startswith(f"{folder}/*/") for one in entry["data_files"])


def test_every_config_of_the_card_loads(released, tmp_path):
    build("m3el", released, tmp_path / "m3el", progress=False)
    card = DatasetCard.load(tmp_path / "m3el" / "README.md")
    for name, entry in configs_of(card).items():
        assert list(load_dataset(str(tmp_path / "m3el"), name)) == [one["split"] for one in entry["data_files"]]


def test_the_card_counts_rows_and_what_was_skipped(released):
    broken = [instance(20, topic="books", Qid=""), instance(21, topic="books", images=False)]
    (released / "books_validation.json").write_text(json.dumps(broken))
    text = card_of(released).text
    assert "| books | 5 | 1 | 3 |" in text
    assert "| instances in the source | 10 |" in text
    assert "| skipped, with a reason | 1 |" in text
    assert r"Skipped: books\_validation.json row 0: has no gold (field Qid)." in text
    assert "The source's own splits are kept." in text


def test_only_the_first_skipped_rows_are_listed(released):
    broken = [instance(20 + number, topic="books", Qid="") for number in range(13)]
    (released / "books_validation.json").write_text(json.dumps(broken))
    text = card_of(released).text
    assert r"books\_validation.json row 9: has no gold" in text
    assert r"books\_validation.json row 10" not in text
    assert "and 3 more" in text


def test_the_card_counts_broken_pictures(tmp_path):
    folder = write_release(tmp_path / "release", [instance(number) for number in range(3)])
    for picture in sorted(folder.rglob("mention*.png"))[:2]:
        picture.write_bytes(b"")
    build("m3el", folder, tmp_path / "m3el", progress=False)
    text = (tmp_path / "m3el" / "README.md").read_text(encoding="utf-8")
    assert "| pictures that are named but absent or broken | 2 |" in text


def test_the_card_says_how_rows_were_split_and_shuffled(tmp_path):
    folder = write_release(tmp_path / "release", [instance(number, images=False) for number in range(20)])
    card = card_of(folder, seed=7)
    assert "shuffled with seed 7" in " ".join(card.text.split())
    assert "own splits" not in card.text
    assert "with seed 7" in " ".join(card.text.split("## Splits")[1].split())
    for split in ("validation", "test"):
        assert f"| {split} rows with a candidate that also stands in train | 0 |" in card.text


def test_both_works_that_share_the_name_are_told_apart(released):
    card = card_of(released)
    assert card.data.pretty_name == "M³EL"
    assert card.text.lstrip().startswith("# M³EL\n")
    assert "2410.18096" in card.text
    assert "2412.10440" in card.text
    assert f"Built by m3el_hf {__version__}" in card.text


def test_rows_with_and_without_a_split_of_the_sources_own_are_told_apart(released):
    write_release(released, [instance(9, topic="person", images=False)], "person.json")
    text = " ".join(card_of(released).text.split())
    assert "The source's own splits are kept for the 8 rows that have one." in text
    assert "(while groups stay under 5 % of the rows, and among rows whose split is not given) a candidate" in text


def test_title_and_licence_can_be_told(released):
    card = card_of(released, title="Our *own* books", license_id="cc-by-4.0")
    assert (card.data.pretty_name, card.data.license) == ("Our *own* books", "cc-by-4.0")
    assert card.text.lstrip().startswith(r"# Our \*own\* books")
    assert "`cc-by-4.0`, as stated by those who built this." in card.text


def test_the_card_says_on_the_hub_how_large_the_data_is(released):
    card = card_of(released)
    assert (card.data.license, card.data.size_categories) == ("unknown", "n<1K")


def test_what_a_source_writes_is_text_and_no_markup(released):
    hostile = "[link](https://example.org) | <b>"
    (released / "books_validation.json").write_text(json.dumps([instance(20, topic="books", Qid=hostile)]))
    text = card_of(released).text
    assert r"its gold \[link\](https://example.org) \| \<b\>" in text
    assert hostile not in text


def test_each_work_is_cited_once(released):
    for card in (card_of(released), card_of(None, "mini", instances=60)):
        assert card.text.count("eprint = {2410.18096}") == card.text.count("eprint = {2412.10440}") == 1


def test_every_column_is_explained(released):
    columns = card_of(released).text.split("| column | |")[1].split("## Splits")[0]
    assert [name for name in ROW_FEATURES if f"`{name}`" not in columns] == []


def test_generated_data_says_so():
    card = card_of(None, "mini", instances=60)
    assert card.data.pretty_name == "M3EL mini"
    assert "generated world" in card.text
    assert "Generated; free of third-party material." in card.text


def test_the_card_leaves_no_template_behind(released):
    content = str(card_of(released))
    assert "{{" not in content
    assert "{%" not in content


def test_the_same_collection_gives_the_same_card(released):
    assert str(card_of(released)) == str(card_of(released))
