from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, load_dataset
from datasets import Image as ImageColumn
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from m3el_hf import ClipNDProcessor
from m3el_hf.modeling.processing_clipnd import COLUMNS
from tests.conftest import PICTURE, encoded
from tests.hub_server import hub_environment, run_python

# Templates.


def test_a_template_says_what_an_entity_s_text_is_made_of(processor):
    names, descriptions = ["Kansas", "Kansas", None, None], ["a band", None, "a band", None]
    for template, names_shown, descriptions_shown in [
        ("ND", names, descriptions),
        ("N", names, None),
        ("D", None, descriptions),
    ]:
        expected = processor.entities(names_shown, descriptions_shown)
        chosen = ClipNDProcessor(processor.image_processor, processor.tokenizer, template=template)
        for batch in (processor.entities(names, descriptions, template=template), chosen.entities(names, descriptions)):
            assert all(
                batch[key] is None if one is None else torch.equal(batch[key], one) for key, one in expected.items()
            )
    assert processor.entities(names, descriptions, template="D")["has_text"].tolist() == [True, False, True, False]
    assert processor.entities(["Kansas"], template="D")["input_ids"] is None


def test_a_mention_s_text_is_its_name_and_context_under_any_template(processor):
    expected = processor.mentions(["Kansas", None], ["a band", "plains"])
    for template in ("N", "D"):
        chosen = ClipNDProcessor(processor.image_processor, processor.tokenizer, template=template)
        assert_same(chosen.mentions(["Kansas", None], ["a band", "plains"]), expected)


def test_each_row_may_have_its_template(processor):
    templates = ["ND", "N", "D", "D"]
    batch = processor.entities(["Kansas"] * 4, ["a band"] * 3 + [None], template=templates)
    expected = processor.entities(["Kansas", "Kansas", None, None], ["a band", None, "a band", None])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert batch["has_text"].tolist() == [True, True, True, False]


@pytest.mark.parametrize("wrong", ["DN", "", "nd", None, 3])
def test_an_unknown_template_is_refused(processor, wrong):
    with pytest.raises(ValueError, match=f"^a template must be one of N, D, ND, not {wrong!r}$"):
        ClipNDProcessor(processor.image_processor, processor.tokenizer, template=wrong)
    with pytest.raises(ValueError, match=f"^row 1: a template must be one of N, D, ND, not {wrong!r}$"):
        processor.entities(["a", "b"], template=["N", wrong])


def test_a_template_of_another_type_is_refused(processor):
    with pytest.raises(ValueError, match="^row 0: a template must be one of N, D, ND, not 3$"):
        processor.entities(["a"], template=3)


def test_templates_must_be_as_many_as_rows(processor):
    with pytest.raises(ValueError, match="a list of templates must have one for each row: 1 for 2 rows"):
        processor.entities(["a", "b"], template=["N"])


# Rows of a dataset.


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert {key for key, value in one.items() if value is not None} == {
        key for key, value in other.items() if value is not None
    }
    assert all(torch.equal(value, other[key]) for key, value in one.items() if value is not None)


def test_rows_of_a_linking_set_are_mentions(processor, data):
    rows = data["train"]
    raw = rows.cast_column("mention_image", ImageColumn(decode=False)).cast_column(
        "candidate_images", List(ImageColumn(decode=False))
    )
    batch = rows[:8]
    expected = processor.mentions(batch["mention"], batch["context"], batch["mention_image"])
    for one in (batch, raw[:8]):
        assert_same(processor.from_rows(one, side="mention"), expected)


@pytest.mark.parametrize("side", ["mention", "entity"])
def test_rows_may_be_listed_streamed_or_formatted(processor, data, store, side):
    if side == "mention":
        rows = data["train"].select(range(5))
    else:
        rows = load_dataset(str(store), "entities", split="train").select(range(5))
    expected = processor.from_rows(rows[:], side=side)
    streamed = rows.to_iterable_dataset()
    loader = DataLoader(rows, batch_size=5, collate_fn=lambda listed: processor.from_rows(listed, side=side))
    for prepared in (
        processor.from_rows(list(rows), side=side),
        processor.from_rows(tuple(streamed), side=side),
        processor.from_rows(list(streamed.take(5)), side=side),
        processor.from_rows(next(streamed.iter(batch_size=5)), side=side),
        processor.from_rows(rows.with_format("numpy")[:], side=side),
        processor.from_rows({column: rows[column] for column in COLUMNS[side]}, side=side),  # each read when it is used
        next(iter(loader)),
    ):
        assert_same(prepared, expected)


def test_a_listed_row_may_lack_what_another_has(processor):
    listed = processor.from_rows([{"mention": "Kansas"}, {"context": "a band"}], side="mention")
    assert_same(listed, processor.mentions(["Kansas", None], [None, "a band"]))


def test_a_column_that_a_task_hides_is_absent(processor, store):
    for task, text, image in [("t2t", True, False), ("i2t", False, True)]:
        batch = load_dataset(str(store), task, split="test")[:4]
        prepared = processor.from_rows(batch, side="mention")
        assert ("input_ids" in prepared, "pixel_values" in prepared) == (text, image)
        assert not prepared["has_image" if text else "has_text"].any()


def test_rows_of_the_entities_are_entities(processor, store):
    batch = load_dataset(str(store), "entities", split="train")[:8]
    expected = processor.entities(batch["name"], batch["description"], batch["image"])
    assert_same(processor.from_rows(batch, side="entity"), expected)


def test_datasets_can_prepare_its_rows(processor, data):
    rows = data["test"].select(range(6))
    expected = processor.from_rows(rows[:], side="mention")
    prepare = lambda batch: processor.from_rows(batch, side="mention")  # noqa: E731
    assert_same(rows.with_transform(prepare)[:], expected)
    assert torch.equal(rows.with_transform(prepare)[2]["pixel_values"], expected["pixel_values"][2])
    mapped = rows.map(prepare, batched=True, remove_columns=rows.column_names).with_format("torch")
    assert_same(mapped[:], expected)
    texts = Dataset.from_dict({"mention": ["Kansas", None], "context": [None, "a band"]})
    assert texts.with_transform(prepare)[1]["has_text"]
    assert texts.map(prepare, batched=True)["has_text"][:] == [True, True]


def test_from_rows_says_what_it_needs(processor):
    with pytest.raises(ValueError, match="^side must be 'mention' or 'entity', not 'candidate'$"):
        processor.from_rows({"mention": ["a"]}, side="candidate")
    with pytest.raises(
        ValueError,
        match="^side 'entity' is prepared of the columns name, description, image; the batch has mention, id$",
    ):
        processor.from_rows({"mention": ["a"], "id": ["1"]}, side="entity")
    with pytest.raises(
        ValueError, match=r"the batch has id, candidate_names; give a row's candidates to entities\(\)$"
    ):
        processor.from_rows({"id": ["1"], "candidate_names": [["a"]]}, side="entity")
    with pytest.raises(ValueError, match=r"^side must be 'mention' or 'entity', not \['mention'\]$"):
        processor.from_rows({"mention": ["a"]}, side=["mention"])
    with pytest.raises(TypeError, match="must be lists, an entry a row, also for a single row; got str$"):
        processor.from_rows({"mention": "Kansas", "context": None}, side="mention")
    with pytest.raises(TypeError, match="^a batch must have a list for each column, or be a list of rows, not str$"):
        processor.from_rows("Kansas", side="mention")
    with pytest.raises(TypeError, match="^row 1: a row must be a dict of columns, not str$"):
        processor.from_rows([{"mention": "a"}, "Kansas"], side="mention")
    with pytest.raises(TypeError, match="^row 1: a text must be a string or None, not int$"):
        processor.from_rows([{"mention": "a"}, {"mention": 7}], side="mention")
    with pytest.raises(ValueError, match="^row 1: .*must be"):
        processor.from_rows({"mention_image": [None, np.zeros(3)]}, side="mention")


# Threads.


def test_threads_get_what_one_alone_gets(processor):
    calls = [
        (
            ["Kansas"] * (1 + k % 5),
            ["of the plains " * (k % 40)] * (1 + k % 5),
            [PICTURE if k % 3 else None] * (1 + k % 5),
        )
        for k in range(60)
    ]
    expected = [processor.mentions(*call) for call in calls]
    fresh = pickle.loads(pickle.dumps(processor))  # a tokenizer whose settings no call has touched yet
    fresh.tokenizer.backend_tokenizer.enable_truncation(5)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for one, other in zip(pool.map(lambda call: fresh.mentions(*call), calls), expected, strict=True):
                assert_same(one, other)


def test_a_tokenizer_that_others_use_meanwhile_changes_nothing(processor):
    """A tokenizer keeps the cutting and padding of its last call."""
    own = pickle.loads(pickle.dumps(processor))
    texts = (["Kansas"] * 20, ["of the plains " * 40] * 20)
    expected = own.mentions(*texts)
    over = Event()

    def meddle() -> None:
        while not over.is_set():
            own.tokenizer(["a band"] * 20, truncation=True, max_length=5, padding="max_length")

    with ThreadPoolExecutor(8) as pool:
        meddlers = [pool.submit(meddle) for _ in range(3)]
        try:
            found = [pool.submit(own.mentions, *texts) for _ in range(100)]
            for one in found:
                assert_same(one.result(), expected)
        finally:
            over.set()
    assert all(one.exception() is None for one in meddlers)


# What is absent.


@pytest.mark.parametrize(
    "wrong",
    [
        *(PICTURE, {"bytes": b""}, Path("a.png"), b"a", np.asarray(PICTURE), np.array(None), torch.tensor(1.0)),
        *({"a", "b"}, iter("ab"), 7, True),
    ],
)
def test_what_is_no_list_is_refused(processor, wrong):
    with pytest.raises(
        TypeError, match=f"must be lists, an entry a row, also for a single row; got {type(wrong).__name__}$"
    ):
        processor.mentions(images=wrong)


@pytest.mark.parametrize("prepare", ["mentions", "entities"])
def test_nothing_given_is_said(processor, prepare):
    with pytest.raises(ValueError, match="^there is nothing to prepare: pass names, contexts or descriptions, images"):
        getattr(processor, prepare)()


def test_no_rows_at_all_are_no_rows(processor):
    batch = processor.mentions([], [], [])
    assert batch["has_text"].shape == batch["has_image"].shape == (0,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": ["a"], "images": []},
        {"names": ["a"], "contexts": ["a", "b"]},
        {"names": ["a"], "contexts": ["a"], "images": [None, None]},
    ],
)
def test_lists_must_be_of_one_length(processor, arguments):
    with pytest.raises(ValueError, match="must be lists of one length: names"):
        processor.mentions(**arguments)


def test_nothing_at_all_is_marked_absent(processor):
    for arguments in ({"names": [None, ""]}, {"images": [None, None]}, {"names": ["\n", " "], "contexts": ["", None]}):
        batch = processor.mentions(**arguments)
        assert batch["has_text"].tolist() == batch["has_image"].tolist() == [False, False]
        assert batch["input_ids"] is batch["attention_mask"] is batch["pixel_values"] is None


def test_a_missing_picture_leaves_the_others_where_they_are(processor):
    batch = processor.entities(["a", "b", "c"], images=[None, PICTURE, None])
    assert batch["has_image"].tolist() == [False, True, False]
    assert torch.equal(batch["pixel_values"][1], processor.pixel_values(PICTURE))


# Saving and loading.


def test_a_saved_processor_prepares_the_same(processor, tmp_path):
    saved = ClipNDProcessor(processor.image_processor, processor.tokenizer, max_text_length=9, template="D")
    saved.save_pretrained(tmp_path)
    loaded = ClipNDProcessor.from_pretrained(tmp_path)
    assert (loaded.max_text_length, loaded.template) == (9, "D")
    arguments = (
        ["Kansas", None, "北京"],
        ["a band known for a red star of the plains", "", "x"],
        [PICTURE, None, None],
    )
    one, other = saved.mentions(*arguments), loaded.mentions(*arguments)
    assert one["input_ids"].shape == (3, 9)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("package", [True, False])
def test_auto_classes_load_it_with_and_without_the_package(processor, tmp_path, package):
    ClipNDProcessor(processor.image_processor, processor.tokenizer, template="N").save_pretrained(tmp_path / "saved")
    (tmp_path / "one.png").write_bytes(encoded())
    expected = processor.entities(["Kansas"], ["a band"], [PICTURE], template="N")
    done = run_python(
        f"""
        import sys
        if {package}:
            import m3el_hf
        else:
            sys.modules["m3el_hf"] = None
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
        batch = processor.entities(["Kansas"], ["a band"], [{str(tmp_path / "one.png")!r}])
        print(processor.template, batch["input_ids"].tolist(), batch["pixel_values"].sum().item())
        """,
        hub_environment("http://127.0.0.1:9", tmp_path / "home"),  # nothing listens at the discard port
    )
    assert done.stdout.split("\n")[0] == f"N {expected['input_ids'].tolist()} {expected['pixel_values'].sum().item()}"


@pytest.mark.parametrize("old", [False, True])
def test_it_comes_out_of_a_plain_clip_folder_and_goes_back_in_by_auto(processor, tmp_path, old):
    clip, saved = tmp_path / "clip", tmp_path / "saved"
    processor.tokenizer.save_pretrained(clip)
    processor.image_processor.save_pretrained(clip)
    if old:  # as the first CLIP checkpoints are on the Hub
        model = json.loads((clip / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (clip / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (clip / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        settings = json.loads((clip / "preprocessor_config.json").read_text()) | {"size": 64, "crop_size": 64}
        del settings["image_processor_type"]
        settings["feature_extractor_type"] = "CLIPFeatureExtractor"
        (clip / "preprocessor_config.json").write_text(json.dumps(settings))
        (clip / "tokenizer.json").unlink()
    loaded = ClipNDProcessor.from_pretrained(clip)
    assert (loaded.max_text_length, loaded.template) == (40, "ND")
    loaded.save_pretrained(saved)
    rows = (["Kansas", "北京"], ["a band known for a red star", None], [PICTURE, None])
    for one in (loaded, AutoProcessor.from_pretrained(saved)):
        assert type(one) is ClipNDProcessor
        assert_same(one.mentions(*rows), processor.mentions(*rows))


def test_torchvision_is_never_needed(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    done = run_python(
        f"""
        import sys
        sys.modules["torchvision"] = None  # importing it fails
        from PIL import Image
        from transformers import AutoProcessor
        import m3el_hf

        processor = AutoProcessor.from_pretrained({str(tmp_path)!r})
        print(processor.entities(["Kansas"], ["a band"], [Image.new("RGB", (9, 9))])["pixel_values"].shape)
        """,
        hub_environment("http://127.0.0.1:9", tmp_path / "home"),
    )
    assert done.stdout.split("\n")[0] == "torch.Size([1, 3, 64, 64])"
