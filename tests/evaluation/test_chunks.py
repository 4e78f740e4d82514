from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import EntityRow, candidates_of
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.chunks import HELD_ANEW, Chunks, EncodedStore, entity_key
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.modeling.encoded_clipnd import Encoded
from tests.conftest import tiny_model
from tests.evaluation.jobs import CountingSystem, counting_system, eleven_rows, make_small
from tests.evaluation.test_evaluator import dataset, make_row, picture
from tests.evaluation.test_sharing import JOB, assert_same
from tests.training.jobs import launch

HEADS = {
    "clip": {"head": "clip"},
    "pooled": {"head": "pooled"},
    "one way": {"head": "matching", "matching_direction": "unidirectional"},
    "both ways": {"head": "matching", "matching_direction": "bidirectional"},
}


def some_entities() -> list[EntityRow]:
    """One has no picture, one no text."""
    lacking = {"candidate_names": ["Kansas", "", "band"], "candidate_descriptions": ["a state", None, "a band"]}
    first, second, third = candidates_of(make_row(0, **lacking))
    return [first._replace(image=None), second, third]


def system_of(head: str, processor: ClipNDProcessor) -> ModelSystem:
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    config = ClipNDConfig.tiny(len(tokenizer), tokenizer.eos_token_id, width=32, **HEADS[head])
    return ModelSystem("model", ClipNDModel(config), processor)


def assert_same_bits(one: Encoded, other: Encoded) -> None:
    assert (type(one), one.fingerprint) == (type(other), other.fingerprint)
    assert one.tensors().keys() == other.tensors().keys()
    for name, value in other.tensors().items():
        assert one.tensors()[name].dtype == value.dtype
        assert torch.equal(one.tensors()[name], value)


# The store.


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_loaded_is_what_was_saved(head, dtype, processor, tmp_path):
    encoded = system_of(head, processor).encode_entities(some_entities()).to(dtype=dtype)
    store = EncodedStore(tmp_path / "not" / "there")
    assert store.load("model", "key") is None
    for one in (encoded, replace(encoded, fingerprint=None), encoded[1:]):
        store.save("model", "key", one)
        assert_same_bits(store.load("model", "key"), one)
    assert store.load("model", "other") is None
    assert store.load("other", "key") is None


def spoilings() -> dict[str, Any]:
    def other_tensors(path: Path) -> None:
        save_file({"text": torch.zeros(2)}, path, {"kind": "Encoded"})

    return {
        "empty": lambda path: path.write_bytes(b""),
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:40]),
        "not safetensors": lambda path: path.write_bytes(b"not safetensors at all" * 99),
        "without a kind": lambda path: save_file({"text": torch.zeros(2)}, path),
        "of another kind": lambda path: save_file({"text": torch.zeros(2)}, path, {"kind": "Decoded"}),
        "of other tensors": other_tensors,
    }


@pytest.mark.parametrize("how", spoilings())
def test_a_file_that_is_spoilt_is_written_anew(how, processor, tmp_path):
    rows, system = dataset([make_row(0)]), CountingSystem("model", tiny_model(processor), processor)
    whole = evaluate([system], rows, cache_dir=tmp_path)
    [path] = tmp_path.rglob("*.safetensors")
    encoded = EncodedStore(tmp_path).load(path.parent.name, path.stem)
    spoilings()[how](path)
    assert EncodedStore(tmp_path).load(path.parent.name, path.stem) is None
    assert_same(evaluate([system], rows, cache_dir=tmp_path), whole)
    assert system.encoded == 6
    assert_same_bits(EncodedStore(tmp_path).load(path.parent.name, path.stem), encoded)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As where the disk is full after ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_cannot_be_written_is_one_line(processor, tmp_path):
    rows, system = dataset([make_row(0)]), counting_system()
    (tmp_path / "file").write_text("")
    with pytest.raises(M3ELError, match=r"cannot keep encoded entities in .*file: .*choose another cache_dir$"):
        evaluate([system], rows, cache_dir=tmp_path / "file")
    with no_file_beyond(500), pytest.raises(M3ELError, match=r"cannot keep encoded entities .*make room") as caught:
        evaluate([system], rows, cache_dir=tmp_path / "full")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "full").rglob("*.*"))
    assert evaluate([system], rows, cache_dir=tmp_path / "full").evaluable("it2it") == 1


# What is encoded anew, and what is not.


def encoded_again(system: CountingSystem, rows: Any, folder: Path) -> int:
    before = system.encoded
    evaluate([system], rows, cache_dir=folder)
    return system.encoded - before


def test_the_same_is_never_encoded_twice(model, processor, tmp_path):
    rows = dataset(map(make_row, range(3)))
    assert encoded_again(CountingSystem("model", model, processor), rows, tmp_path) == 9
    copy = ClipNDModel(model.config)
    copy.load_state_dict(model.state_dict())
    same = ClipNDProcessor(processor.image_processor, processor.tokenizer)
    for system in (
        CountingSystem("model", model, processor),
        CountingSystem("other name", model.train(), processor),
        CountingSystem("copy", copy, processor),
        CountingSystem("model", model, same),
    ):
        assert encoded_again(system, rows, tmp_path) == 0
    changed = dataset(make_row(number, mention="another", id=f"other {number}") for number in range(3))
    assert encoded_again(CountingSystem("model", model, processor), changed, tmp_path) == 0
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_other_entities_are_encoded_anew(tmp_path):
    system = counting_system()
    assert encoded_again(system, dataset([make_row(0)]), tmp_path) == 3
    own = make_row(0)
    changes = (
        {"candidate_names": ["another", *own["candidate_names"][1:]]},
        {"candidate_descriptions": ["another", *own["candidate_descriptions"][1:]]},
        {"candidate_qids": [*own["candidate_qids"][:2], "Q404"]},
        {"candidate_images": [picture(77), *own["candidate_images"][1:]]},
        {"candidate_images": [None, *own["candidate_images"][1:]]},
        {"answer": 2} | {name: value[::-1] for name, value in own.items() if name.startswith("candidate_")},
    )
    for number, change in enumerate(changes, 2):
        assert encoded_again(system, dataset([make_row(0, **change)]), tmp_path) == 3
        assert len(list(tmp_path.rglob("*.safetensors"))) == number


def test_another_model_or_processor_encodes_anew(processor, tmp_path):
    rows = dataset([make_row(0)])

    def changed(**settings: Any) -> ClipNDProcessor:
        own = {"max_text_length": processor.max_text_length, "template": processor.template} | settings
        return ClipNDProcessor(processor.image_processor, processor.tokenizer, **own)

    nudged = tiny_model(processor)
    with torch.no_grad():
        nudged.clip.text_projection.weight[3, 5] += 1e-3
    pictures = deepcopy(processor.image_processor)
    pictures.image_mean = [0.5, 0.5, 0.5]
    systems = [
        CountingSystem("model", tiny_model(processor), processor),
        CountingSystem("model", tiny_model(processor, seed=1), processor),
        CountingSystem("model", tiny_model(processor, "matching"), processor),
        CountingSystem("model", nudged, processor),
        CountingSystem("model", tiny_model(processor), changed(template="N")),
        CountingSystem("model", tiny_model(processor), changed(max_text_length=8)),
        CountingSystem("model", tiny_model(processor), ClipNDProcessor(pictures, processor.tokenizer)),
    ]
    assert len({system.fingerprint for system in systems}) == len(systems)
    for number, system in enumerate(systems, 1):
        assert encoded_again(system, rows, tmp_path) == 3
        assert len(list(tmp_path.iterdir())) == number


def test_without_a_cache_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    system, rows = counting_system(), dataset([make_row(0)])
    for times in (1, 2):
        evaluate([system], rows)
        assert system.encoded == 3 * times
    assert not list(tmp_path.iterdir())


def test_an_evaluation_that_is_killed_encodes_only_what_is_left(monkeypatch, tmp_path):
    """Killed when its fourth chunk is written, but not yet under its name: the chunk counts as not written."""
    assert launch([JOB, "killed", str(tmp_path / "cache")], 1, check=False).returncode == -9
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    make_small(monkeypatch.setattr)
    system, rows = counting_system(), eleven_rows()
    resumed = evaluate([system], rows, cache_dir=tmp_path / "cache")
    assert system.encoded == 33 - 3 * 5
    assert len(list(tmp_path.rglob("*.safetensors"))) == 7
    assert_same(resumed, evaluate([counting_system()], rows))


# Chunks in memory.


def test_of_many_chunks_few_are_held():
    class Bare:
        fingerprint = None
        asked: list[int] = []  # noqa: RUF012

        def encode_entities(self, entities: list[int]) -> list[int]:
            self.asked += entities
            return entities

    system: Any = Bare()
    chunks = Chunks(lambda number: [number], HELD_ANEW + 2, EncodedStore(Path("nowhere")))  # type: ignore[list-item]
    assert [chunks.encoded(system, None, number) for number in range(len(chunks))] == [
        [n] for n in range(HELD_ANEW + 2)
    ]
    assert system.asked == list(range(HELD_ANEW + 2))
    chunks.encoded(system, None, HELD_ANEW + 1)
    chunks.encoded(system, None, 2)  # is held longest, and now asked for last
    assert len(system.asked) == HELD_ANEW + 2
    chunks.encoded(system, None, 0)
    chunks.encoded(system, None, 2)
    assert system.asked[HELD_ANEW + 2 :] == [0]
    chunks.encoded(system, None, 3)
    assert system.asked[HELD_ANEW + 2 :] == [0, 3]


def test_systems_of_one_fingerprint_share_what_is_encoded():
    first = counting_system()
    second = CountingSystem("second", first.model, first.collator)
    evaluate([first, second], dataset([make_row(0)]))
    assert first.encoded + second.encoded == 3


def test_an_entitys_key_is_of_all_that_it_shows():
    one = EntityRow("Q1", "a", "b", {"bytes": b"c", "path": None})
    others = [
        one._replace(qid="Q2"),
        one._replace(name="b"),
        one._replace(name=None),
        one._replace(name="None"),
        one._replace(description=None),
        one._replace(name="a', 'b", description=None),
        one._replace(image=None),
        one._replace(image={"bytes": b"", "path": None}),
        one._replace(name="\udc80"),
    ]
    assert len({entity_key(entity) for entity in [one, *others]}) == 10
    assert entity_key(one) == entity_key(one._replace(image={"bytes": b"c", "path": "elsewhere.png"}))
