from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3el_hf.data.collator import LinkingCollator, candidates_of, undecoded
from m3el_hf.data.schema import ROW_FEATURES
from m3el_hf.errors import M3ELError
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import Feed, TrainingCollator, epoch_order
from m3el_hf.training.log import read_log
from m3el_hf.training.loop import train
from m3el_hf.training.objective import TrainingBatch
from m3el_hf.training.schedule import Clock
from tests.conftest import tiny_model


def arguments(**changes: Any) -> TrainingArguments:
    drawn = {"tasks_per_mention": 2, "token_dropout": 0.3, "augment_pictures": True, "entity_text": "N=1,D=1,ND=1"}
    return TrainingArguments(**({"per_device_train_batch_size": 4} | drawn | changes))


@pytest.fixture(scope="module")
def rows(data: DatasetDict) -> Dataset:
    return data["train"].select(range(11))


@pytest.fixture(scope="module")
def collator(processor) -> LinkingCollator:
    return LinkingCollator(processor)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, TrainingBatch):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


# The order


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**31), st.integers(0, 9))
def test_every_row_comes_exactly_once_an_epoch(rows, size, seed, epoch):
    batches = epoch_order(rows, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert all(len(batch) == size for batch in batches[:-1])


@given(st.integers(4, 60), st.integers(1, 4), st.integers(2, 4), st.integers(0, 9))
def test_what_processes_see_together_depends_on_the_whole_batch_alone(rows, size, processes, epoch):
    whole = [batch for batch in epoch_order(rows, size * processes, 0, epoch) if len(batch) >= processes]
    divided = [epoch_order(rows, size, 0, epoch, processes, process) for process in range(processes)]
    together = [[row for part in parts for row in part] for parts in zip(*divided, strict=True)]
    assert together == whole
    assert all(1 <= len(part) <= size for parts in divided for part in parts)


def test_each_epoch_and_seed_has_its_own_order():
    orders = [str(epoch_order(40, 8, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


# The feed


def feed_of(rows: Any, collator: LinkingCollator, settings: TrainingArguments, *who: int) -> tuple[Feed, Clock]:
    feed = Feed(rows, collator, settings, *who)
    return feed, Clock(settings, feed.steps_per_epoch)


def run(rows: Any, collator: LinkingCollator, settings: TrainingArguments, begin: int, end: int) -> list[TrainingBatch]:
    """The batches of steps ``begin`` to ``end``, as the loop asks for them."""
    feed, clock = feed_of(rows, collator, settings)
    clock.start(begin)
    batches, taken = feed.batches(clock, lambda epoch: None), []
    while clock.step < end:
        taken.append(next(batches))
        clock.advance(0.0)
    return taken


KINDS = {"loaded": lambda rows: rows, "streamed": lambda rows: rows.to_iterable_dataset(num_shards=3)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_any_step_gets_the_batches_it_would_have_had(kind, rows, collator):
    settings = arguments(max_steps=8, tasks="t2t=1,t2i=1; 0.3: i2i=1; 0.6: it2it=1,i2it=1")
    given = KINDS[kind](rows)
    through = run(given, collator, settings, 0, 8)
    assert len({str(batch.views.unique(dim=0).tolist()) for batch in through}) >= 3  # each stage shows other things
    for begin in range(1, 8):
        assert same_all(run(given, collator, settings, begin, 8), through[begin:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_begins_within_an_epoch(kind, rows, collator):
    settings = arguments(max_steps=3, num_train_epochs=1, tasks="t2t=1; 0.5: it2it=1")
    shown = [batch.views.any(0).tolist() for batch in run(KINDS[kind](rows), collator, settings, 0, 3)]
    assert shown == [[True, False, True, False]] * 2 + [[True] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_no_batch(kind, rows, collator):
    given = KINDS[kind](rows)
    none, two = (run(given, collator, arguments(dataloader_num_workers=n, max_steps=9), 1, 5) for n in (0, 2))
    assert same_all(none, two)


def same_all(some: list[TrainingBatch], others: list[TrainingBatch]) -> bool:
    return len(some) == len(others) and all(map(same, some, others))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_draw_nothing_from_the_random_state_that_dropout_uses(kind, rows, collator):
    before = torch.get_rng_state()
    run(KINDS[kind](rows), collator, arguments(max_steps=9), 1, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_hold_every_row_once_and_are_shuffled_anew(kind, rows, collator):
    batches = run(KINDS[kind](rows), collator, arguments(max_steps=9), 0, 9)
    epochs = [[name for batch in batches[first : first + 3] for name in batch.names] for first in (0, 3, 6)]
    assert [len(batch.names) for batch in batches] == [4, 4, 3] * 3
    assert all(sorted(epoch) == sorted(rows["id"]) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("shards", [1, 2])
def test_a_stream_is_divided_among_processes(shards, rows, collator):
    stream, seen = rows.to_iterable_dataset(num_shards=shards), []
    for process in range(2):
        feed, clock = feed_of(stream, collator, arguments(max_steps=9), 2, process)
        seen += [name for batch in islice(feed.batches(clock, lambda epoch: None), 2) for name in batch.names]
    assert sorted(seen) == sorted(rows["id"])


def test_epochs_are_announced_before_their_first_batch_alone(rows, collator):
    told: list[tuple[int, int]] = []
    feed, clock = feed_of(rows, collator, arguments(num_train_epochs=9))
    clock.start(2)
    batches = feed.batches(clock, lambda epoch: told.append((epoch, clock.step)))
    for _ in range(5):
        next(batches)
        clock.advance(0.0)
    assert told == [(1, 3), (2, 6)]


def test_too_few_rows_are_said(rows, collator):
    with pytest.raises(M3ELError, match=r"\Athere are 0 training rows for 1 processes: build .*\Z"):
        Feed(rows.select([]), collator, arguments())
    with pytest.raises(M3ELError, match=r"\Athere are 3 training rows for 4 processes: build .*\Z"):
        Feed(rows.select(range(3)), collator, arguments(), 4, 0)
    empty = IterableDataset.from_generator(lambda: iter([]), features=ROW_FEATURES)
    feed, clock = feed_of(empty, collator, arguments(max_steps=9))
    with pytest.raises(M3ELError, match=r"\Athere are no training rows: build .*\Z"):
        next(feed.batches(clock, lambda epoch: None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_named(kind, rows, collator):
    with pytest.raises(M3ELError, match=r"\Athe rows have no candidate_images: training takes .*\Z"):
        Feed(KINDS[kind](rows.remove_columns("candidate_images")), collator, arguments())


def test_a_stream_must_name_its_columns(rows, collator):
    plain = list(undecoded(rows))
    with pytest.raises(M3ELError, match=r"\Athe streamed rows do not name their columns: make them with features=.*\Z"):
        Feed(IterableDataset.from_generator(lambda: iter(plain)), collator, arguments())
    named = IterableDataset.from_generator(lambda: iter(plain), features=ROW_FEATURES)
    assert len(run(named, collator, arguments(max_steps=9), 0, 1)[0].names) == 4


def test_hard_negatives_of_a_stream_are_refused(rows, collator):
    with pytest.raises(
        M3ELError, match=r"\Ahard negatives are looked for among all rows: leave mine_negatives out.*\Z"
    ):
        Feed(rows.to_iterable_dataset(), collator, arguments(mine_negatives=1))


# A batch


def of_text(side: dict[str, Any], place: int) -> tuple[list[int], list[int]]:
    """A row's tokens and mask without padding."""
    end = int(side["attention_mask"][place].nonzero().max()) + 1
    return side["input_ids"][place, :end].tolist(), side["attention_mask"][place, :end].tolist()


def test_a_row_is_drawn_alike_in_whatever_batch_it_stands(rows, collator):
    plain = list(undecoded(rows))
    settings = arguments()
    alone = {row["id"]: TrainingCollator(collator, settings, 3)([row]) for row in plain}
    changed = 0
    for chosen in (plain, plain[::-1], plain[3:9], plain[6:2:-2]):
        batch = TrainingCollator(collator, settings, 3)(chosen)
        qids = list(dict.fromkeys(qid for row in chosen for qid in row["candidate_qids"]))
        for place, row in enumerate(chosen):
            one = alone[row["id"]]
            assert torch.equal(batch.views[batch.rows == place], one.views)
            for kind in ("has_text", "has_image"):
                assert batch.mentions[kind][place] == one.mentions[kind][0]
            assert of_text(batch.mentions, place) == of_text(one.mentions, 0)
            if row["mention_image"]:
                assert torch.equal(batch.mentions["pixel_values"][place], one.mentions["pixel_values"][0])
            for other, qid in enumerate(row["candidate_qids"]):
                found = qids.index(qid)
                assert batch.entity_ids[found] == one.entity_ids[other]
                assert of_text(batch.entities, found) == of_text(one.entities, other)
                assert torch.equal(batch.entities["pixel_values"][found], one.entities["pixel_values"][other])
            changed += not same(one, TrainingCollator(collator, settings, 4)([row]))
        assert [qids[label] for label in batch.labels] == [row["answer_qid"] for row in chosen]
    assert changed == len(plain) * 2 + 6 + 2  # every other epoch draws anew


def test_a_batch_hides_what_its_tasks_do_not_show(rows, collator):
    plain = [row | {"mention_image": None} if n % 3 == 0 else row for n, row in enumerate(undecoded(rows))]
    for epoch in range(4):
        batch = TrainingCollator(collator, arguments(tasks_per_mention=1), epoch)(plain)
        assert batch.rows.tolist() == list(range(len(plain)))
        assert torch.equal(batch.mentions["has_text"], batch.views[:, 0])
        assert torch.equal(batch.mentions["has_image"], batch.views[:, 1])
        assert not batch.mentions["has_image"][::3].any()


def test_what_a_task_hides_of_either_side_changes_no_score_and_no_loss(rows, collator, processor):
    model, plain = tiny_model(processor), list(undecoded(rows))
    settings = arguments(tasks_per_mention=1, tasks="t2i=1", augment_pictures=False, entity_text=None)
    noise = [
        row | {"mention_image": plain[n - 1]["mention_image"], "candidate_descriptions": ["other words"] * 3}
        for n, row in enumerate(plain)
    ]
    outputs = []
    for some in (plain, noise):
        batch = TrainingCollator(collator, settings, 0)(some)
        assert batch.views.tolist() == [[True, False, False, True]] * len(some)
        with torch.no_grad():
            outputs.append(model(batch.mentions, batch.entities, batch.labels, batch.rows, batch.views))
    assert torch.equal(outputs[0].scores, outputs[1].scores) and torch.equal(outputs[0].loss, outputs[1].loss)


def test_a_row_that_fits_no_task_is_shown_nothing(rows, collator):
    one, *rest = list(undecoded(rows.select(range(3))))
    bare = one | {"mention": "", "context": "words alone are no name", "mention_image": None}
    batch = TrainingCollator(collator, arguments(), 0)([bare, *rest])
    assert 0 not in batch.rows
    assert not batch.mentions["has_text"][0] and not batch.mentions["has_image"][0]


def test_entities_show_the_text_that_is_drawn(rows, collator, processor):
    plain = list(undecoded(rows))
    entities = {one.qid: one for row in plain for one in candidates_of(row)}
    for text, template in (("N=1", "N"), ("D=3,N=0", "D"), ("ND=1", "ND")):
        batch = TrainingCollator(collator, arguments(entity_text=text, token_dropout=0.0), 0)(plain)
        shown = processor.entities(*zip(*(one[1:3] for one in entities.values()), strict=True), template=template)
        assert torch.equal(batch.entities["input_ids"], shown["input_ids"])


def test_an_entity_s_missing_name_or_description_is_not_drawn(rows, collator):
    one = next(iter(undecoded(rows)))
    bare = one | {"candidate_names": ["Kansas", "Kansas", "Kansas"], "candidate_descriptions": [None, " ", "a band"]}
    for epoch in range(10):
        batch = TrainingCollator(collator, arguments(entity_text="D=1,N=0.01", tasks="t2t=1"), epoch)([bare])
        assert batch.entities["has_text"].all()


def test_hard_negatives_are_more_entities_and_count_as_candidates(rows, collator):
    one, *rest = list(undecoded(rows))
    own = one["candidate_qids"]
    others = list({one.qid: one for row in rest for one in candidates_of(row) if one.qid not in own}.values())[:2]
    without = TrainingCollator(collator, arguments(), 0)([one])
    batch = TrainingCollator(collator, arguments(), 0, negatives={one["id"]: others, "another": others * 9})([one])
    assert without.candidates == len(own) and batch.candidates == len(own) + 2
    assert len(batch.entity_ids) == len(own) + 2
    assert torch.equal(batch.entity_ids[: len(own)], without.entity_ids)
    assert torch.equal(batch.labels, without.labels)


def test_the_log_tells_how_many_candidates_share_an_encoding(processor, rows, tmp_path: Path):
    doubled = [row | {"id": f"{row['id']}-{n}"} for row in undecoded(rows.select(range(6))) for n in range(2)]
    given = Dataset.from_list(doubled, features=ROW_FEATURES)
    settings = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, logging_steps=3, eval_steps=9, save_steps=9
    )
    train(tiny_model(processor), processor, given, None, settings, progress=False)
    steps = [[doubled[number] for number in batch] for batch in epoch_order(12, 4, 0, 0)]
    brought = [[qid for row in step for qid in row["candidate_qids"]] for step in steps]
    ratio = sum(map(len, brought)) / sum(len(set(one)) for one in brought)
    logged = [entry["candidates_per_entity"] for entry in read_log(tmp_path) if "candidates_per_entity" in entry]
    assert ratio > 1 and logged == [pytest.approx(ratio)]
