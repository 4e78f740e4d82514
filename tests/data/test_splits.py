from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3el_hf.data.collection import Collection, collect
from m3el_hf.data.schema import NIL, SPLITS, Entity, Picture, Record
from m3el_hf.data.splits import MAX_GROUP_SHARE, ROUNDS, TOLERANCE, Grouping, assign_splits
from m3el_hf.tasks import TOPICS
from tests.conftest import real, rows_of

quick = settings(deadline=None, max_examples=60, database=None)


def make(
    number: int,
    gold: str = "",
    *,
    topic: str = "person",
    context: str | None = None,
    picture: Picture | None = None,
    others: Sequence[str] = (),
    split: str | None = None,
) -> Record:
    gold = gold or f"Q{number}"
    qids = [gold, *(other for other in dict.fromkeys(others) if other != gold)]
    candidates = tuple(Entity(qid, qid) for qid in qids)
    return Record(f"row-{number}", f"row {number}", topic, split, "name", context, picture, gold, candidates)


def grouping(records: Sequence[Record]) -> Grouping:
    made = Grouping()
    for record in records:
        made.add(record, record.topic or "")
    return made


def group_rows(records: Sequence[Record]) -> list[str]:
    return grouping(records).groups()


def split_rows(records: Sequence[Record], seed: int = 0) -> list[str]:
    made = grouping(records)
    return assign_splits(made.topics, made.released, made.groups(), seed)


def partition(labels: Sequence[object]) -> set[frozenset[int]]:
    """Which rows have the same label, whatever it is."""
    members = defaultdict(set)
    for row, label in enumerate(labels):
        members[label].add(row)
    return {frozenset(rows) for rows in members.values()}


FOLDER = Path(tempfile.mkdtemp(prefix="m3el-test-"))
CONTENTS = {"a": b"x" * 9999, "b": b"x" * 9998, "copy of b": b"x" * 9998, "c": b"x" * 9998 + b"y", "d": b"d", "e": b""}
for name, content in CONTENTS.items():
    (FOLDER / name).write_bytes(content)

PICTURES = [
    Picture(path=FOLDER / "a", url="https://example.org/1"),
    Picture(path=FOLDER / "b", url="https://example.org/1"),
    Picture(path=FOLDER / "b", url="https://example.org/2"),
    Picture(path=FOLDER / "copy of b"),
    Picture(path=FOLDER / "c"),
    Picture(path=FOLDER / "d", url="N/A"),
    Picture(path=FOLDER / "e", url="N/A"),
    Picture(path=FOLDER / "absent", url="N/A"),
    Picture(path=FOLDER / "a" / "absent"),
    Picture(path=FOLDER),
    Picture(data=b"1"),
    Picture(data=b"2"),
    Picture(path=FOLDER / "a", url="https://example.org/3", flaw="is bad"),
    Picture(),
]


@st.composite
def worlds(draw: st.DrawFn, candidates: int = 0, released: bool = False) -> list[Record]:
    """Rows in which little is shared, so that groups are of many sizes."""
    size = draw(st.integers(1, 40))
    number = st.integers(0, 2 * size)
    return [
        make(
            row,
            f"G{draw(number)}",
            topic=draw(st.sampled_from(TOPICS[:2])),
            context=draw(st.none() | number.map("sentence {}".format)),
            picture=draw(st.none() | st.sampled_from(PICTURES)) if draw(st.integers(0, 4)) == 0 else None,
            others=[f"C{draw(number)}" for _ in range(draw(st.integers(0, candidates)))],
            split=draw(st.none() | st.sampled_from(["train", "validation", "test"])) if released else None,
        )
        for row in range(size)
    ]


def content(picture: Picture) -> bytes | None:
    return picture.data if picture.path is None else CONTENTS.get(picture.path.name) if picture.path != FOLDER else None


def must_join(one: Record, other: Record) -> bool:
    """Whether two rows show the same: gold, sentence or mention picture."""
    a, b = one.picture, other.picture
    same_picture = (
        a is not None
        and b is not None
        and not (a.flaw or b.flaw)
        and ((content(a) is not None and content(a) == content(b)) or (a.url not in (None, "N/A") and a.url == b.url))
    )
    same_context = one.context is not None and one.context == other.context
    return one.answer_qid == other.answer_qid or same_context or same_picture


def closure(records: list[Record]) -> list[int]:
    """The first row that each row is tied to through any chain, found slowly."""
    first = list(range(len(records)))
    changed = True
    while changed:
        changed = False
        for one, other in combinations(range(len(records)), 2):
            if must_join(records[one], records[other]) and first[one] != first[other]:
                first[one] = first[other] = min(first[one], first[other])
                changed = True
    return first


@given(records=worlds())
@quick
def test_groups_are_what_gold_sentence_and_picture_tie(records):
    assert partition(group_rows(records)) == partition(closure(records))


@given(records=worlds(candidates=2))
@quick
def test_shared_candidates_join_whole_groups_up_to_a_limit(records):
    tied, groups = closure(records), group_rows(records)
    parts = defaultdict(set)
    for row, group in zip(tied, groups, strict=True):
        parts[group].add(row)
    assert len(set(tied)) == sum(map(len, parts.values()))  # no tied rows are parted
    sizes = Counter(groups)
    for group, rows in parts.items():
        if len(rows) > 1:
            assert sizes[group] <= MAX_GROUP_SHARE * len(records)
    golds = defaultdict(set)
    for record, group in zip(records, groups, strict=True):
        golds[group].add(record.answer_qid)
    assert all(group in golds[group] for group in sizes)  # named after one of its golds


def test_rows_with_a_common_candidate_stay_together_while_groups_are_small():
    records = [make(row, others=[f"C{row // 2}"]) for row in range(40)]
    assert partition(group_rows(records)) == partition([row // 2 for row in range(40)])


def test_a_candidate_of_nearly_every_row_ties_nothing():
    records = [make(row, others=["everywhere"]) for row in range(40)]
    assert len(set(group_rows(records))) == 40


def test_a_long_chain_is_cut_into_neighbourhoods():
    """Each row shares a candidate with the next."""
    records = [make(row, others=[f"C{row}", f"C{row + 1}"]) for row in range(2000)]
    places = defaultdict(list)
    for row, group in enumerate(group_rows(records)):
        places[group].append(row)
    assert all(rows[-1] - rows[0] <= 2 * ROUNDS for rows in places.values())
    assert len(places) <= 2000 / ROUNDS


def test_a_neighbourhood_that_is_too_large_is_cut_closer():
    """Forty rows each share a candidate, and one of them another with its like: three steps reach 120 rows and more."""
    records = [
        make(row, others=[f"star{row // 40}", *([f"bridge{row // 40 - 1}", f"bridge{row // 40}"] * (row % 40 == 0))])
        for row in range(1200)
    ]
    groups = group_rows(records)
    assert max(Counter(groups).values()) <= MAX_GROUP_SHARE * 1200
    held = [Counter(groups[40 * star : 40 * star + 40]).most_common(1)[0][1] for star in range(30)]
    assert min(held) >= 39  # but for the bridge, a star is never cut


def test_unknown_pictures_are_not_the_same_picture():
    lost = Picture(path=Path("photo.png"), url="https://example.org/1", flaw="has no path")
    for picture in (Picture(), lost, Picture(url="N/A")):
        assert len(set(group_rows([make(row, picture=picture) for row in range(5)]))) == 5


@given(records=worlds(candidates=2), seed=st.integers(0, 9))
@quick
def test_no_group_spans_splits_not_even_over_topics(records, seed):
    groups = group_rows(records)
    splits = split_rows(records, seed)
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    assert set(splits) <= {"train", "validation", "test"}


@given(records=worlds(candidates=2), seed=st.integers(0, 9))
@quick
def test_the_same_seed_gives_the_same_splits(records, seed):
    first = split_rows(records, seed)
    assert split_rows([replace(record) for record in records], seed) == first


@given(records=worlds(released=True), seed=st.integers(0, 9))
@quick
def test_released_splits_are_kept(records, seed):
    splits = split_rows(records, seed)
    assert all(record.split in (None, split) for record, split in zip(records, splits, strict=True))


def tied_in_runs(topics: int, rows: int, run: int) -> list[Record]:
    """Runs of rows with one gold."""
    return [
        make(topic * rows + row, f"G{topic}-{row // run}", topic=TOPICS[topic])
        for topic in range(topics)
        for row in range(rows)
    ]


@given(topics=st.integers(1, 5), rows=st.integers(10, 120), run=st.integers(1, 9), seed=st.integers(0, 9))
@quick
def test_each_topic_is_split_about_eighty_ten_ten(topics, rows, run, seed):
    records = tied_in_runs(topics, rows, run)
    splits = split_rows(records, seed)
    counts = Counter((record.topic, split) for record, split in zip(records, splits, strict=True))
    for topic in TOPICS[:topics]:
        for split in ("validation", "test"):
            assert abs(counts[topic, split] - 0.1 * rows) < run + TOLERANCE * 0.1 * rows
        assert abs(counts[topic, "train"] - 0.8 * rows) < 2 * (run + TOLERANCE * 0.1 * rows)


def test_another_seed_gives_another_split():
    records = tied_in_runs(1, 200, 2)
    tests = {tuple(row for row, split in enumerate(split_rows(records, seed)) if split == "test") for seed in range(5)}
    assert len(tests) == 5


def test_held_out_rows_come_from_all_over_the_file():
    records = tied_in_runs(1, 400, 1)
    splits = split_rows(records)
    for split in ("validation", "test"):
        rows = [row for row, one in enumerate(splits) if one == split]
        assert min(rows) < 100
        assert max(rows) > 300


def test_a_topic_is_split_alike_with_and_without_the_others():
    records = tied_in_runs(3, 100, 3)
    together = split_rows(records, 4)
    for topic in range(3):
        own = records[100 * topic : 100 * (topic + 1)]
        assert split_rows(own, 4) == together[100 * topic : 100 * (topic + 1)]


@given(records=worlds(candidates=3, released=True), seed=st.integers(0, 3))
@quick
def test_shared_candidates_are_counted(records, seed):
    splits = split_rows(records, seed)
    assert grouping(records).shared_candidates(splits) == {
        split: len(rows_that_share(records, splits, split)) for split in ("validation", "test")
    }


def rows_that_share(records: Sequence[Record], splits: Sequence[str], held_out: str) -> list[str]:
    """The held-out rows of which a candidate was seen in training, found row by row."""
    trained = [record for record, split in zip(records, splits, strict=True) if split == "train"]
    seen = {candidate.qid for record in trained for candidate in record.candidates}
    return [
        record.id
        for record, split in zip(records, splits, strict=True)
        if split == held_out and seen & {candidate.qid for candidate in record.candidates}
    ]


def test_nil_ties_nothing_and_what_is_said_names_the_group():
    records = [replace(make(row, NIL), mention=f"mention {row}") for row in range(4)]
    names = group_rows(records)
    assert len(set(names)) == 4
    assert NIL not in names
    assert group_rows([replace(record, id="moved", source="moved") for record in records[::-1]]) == names[::-1]


def test_few_new_rows_beside_many_old_ones_are_split_too():
    """The limit of a group counts the rows that are to be split, not those that are."""
    old = [make(row, split="train") for row in range(1000)]
    new = [make(2000 + row, others=[f"C{row % 5}", "everywhere"]) for row in range(40)]
    assert set(split_rows([*old, *new])[1000:]) == set(SPLITS)


@given(records=worlds(candidates=2), seed=st.integers(0, 3), order=st.randoms(use_true_random=False))
@quick
def test_the_order_of_the_rows_decides_nothing(records, seed, order):
    shuffled = order.sample(records, len(records))
    splits = dict(zip((record.id for record in shuffled), split_rows(shuffled, seed), strict=True))
    assert [splits[record.id] for record in records] == split_rows(records, seed)


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_are_added_leave_the_others_where_they_are(seed):
    """Anywhere in the source, and a tenth of what there was; only cuts that miss their target move."""
    records = tied_in_runs(1, 6000, 3)
    old = [record for record in records if int(record.answer_qid.rpartition("-")[2]) % 11]
    before = dict(zip((record.id for record in old), split_rows(old, seed), strict=True))
    after = dict(zip((record.id for record in records), split_rows(records, seed), strict=True))
    moved = sum(after[name] != split for name, split in before.items())
    assert moved <= 0.01 * len(before)


def nearly_all_hang_together(seed: int, size: int = 3000) -> list[Record]:
    """Distractors are rows of like number, a few of any, so that there is a near and a far."""
    draw = np.random.default_rng(seed)
    near = np.arange(size)[:, None] + np.rint(draw.standard_cauchy((size, 2)) * 5).astype(int)
    return [make(row, others=[f"Q{other % size}" for other in near[row]]) for row in range(size)]


def test_rows_that_are_added_move_few_where_nearly_all_hang_together():
    moved, rows = 0, 0
    for seed in range(5):
        records = nearly_all_hang_together(seed)
        added = set(np.random.default_rng(seed).choice(len(records), 30, replace=False).tolist())
        old = [record for row, record in enumerate(records) if row not in added]
        before = dict(zip((record.id for record in old), split_rows(old), strict=True))
        after = dict(zip((record.id for record in records), split_rows(records), strict=True))
        moved += sum(after[name] != split for name, split in before.items())
        rows += len(before)
    assert moved <= 0.05 * rows


def test_neighbourhoods_share_fewer_candidates_than_rows_alone():
    records = nearly_all_hang_together(0)
    alone = assign_splits(["person"] * len(records), [None] * len(records), [record.id for record in records], 0)
    shared, by_chance = [
        sum(len(rows_that_share(records, splits, held_out)) for held_out in ("validation", "test"))
        for splits in (split_rows(records), alone)
    ]
    assert shared < 0.8 * by_chance


def test_a_group_with_rows_in_two_released_splits_is_not_trained_on():
    records = [make(row, "G", split=split) for row, split in enumerate(["train", "test", "train", None])]
    assert split_rows(records) == ["train", "test", "train", "test"]


def test_a_candidate_draws_no_row_to_one_whose_split_is_given():
    """Else nearly all rows of a new version would follow the few old test rows that they share an entity with."""
    old = [make(row, others=["everywhere", f"C{row}"], split=SPLITS[row % 3]) for row in range(30)]
    new = [make(100 + row, others=["everywhere", f"C{row % 30}"]) for row in range(300)]
    counts = Counter(split_rows([*old, *new])[30:])
    assert all(abs(counts[split] - share * 300) <= 10 for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True))


@pytest.mark.parametrize("tie", [{"gold": "Q0"}, {"context": "said"}, {"picture": PICTURES[1]}])
def test_gold_sentence_and_picture_draw_a_row_to_one_whose_split_is_given(tie):
    for split in SPLITS:
        old = replace(make(0, split=split, **(tie if "gold" not in tie else {})))
        records = [old, *(make(row, **({"gold": f"Q{row}"} | tie)) for row in range(1, 4))]
        assert split_rows(records)[1:] == [split] * 3


def assert_clean(collection: Collection) -> None:
    """No group, gold or sentence stands in two splits."""
    seen: dict[object, str] = {}
    for split in SPLITS:
        for row in rows_of(collection, split):
            keys = [("group", row["split_group"]), ("gold", row["answer_qid"])]
            keys += [("context", row["context"])] if row["context"] else []
            keys += [("picture", row["mention_image"]["bytes"])] if row["mention_image"] else []
            for key in keys:
                assert seen.setdefault(key, split) == split, f"{key} stands in two splits"


def rows_sharing(collection: Collection, held_out: str) -> int:
    """The rows of a held-out split of which a candidate was seen in training, found row by row."""
    seen = {qid for row in rows_of(collection, "train") for qid in row["candidate_qids"]}
    return sum(not seen.isdisjoint(row["candidate_qids"]) for row in rows_of(collection, held_out))


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_rows_of_mini_share_no_candidate_with_train(seed):
    collection = collect("mini", None, seed, instances=400)
    assert_clean(collection)
    for split in ("validation", "test"):
        assert collection.count(split) >= 20
        assert rows_sharing(collection, split) == 0
        assert collection.report.counts[f"{split} rows with a candidate that also stands in train"] == 0


def test_emoji_keeps_its_released_splits():
    collection = collect("m3el", real("data/emoji"))
    counts = {split: collection.count(split, "common") for split in ("train", "validation", "test")}
    assert counts == {"train": 921, "validation": 141, "test": 257}
    assert collection.count("train") == 921
    assert collection.topics == ["common"]
    assert collection.released
    for split in ("validation", "test"):
        assert rows_sharing(collection, split) == 0
        assert collection.report.counts[f"{split} rows with a candidate that also stands in train"] == 0
    assert (collection.report.read, collection.report.skipped) == (1319, [])


def test_persons_are_split_by_groups():
    collection = collect("m3el", real("data/person"))
    assert (collection.report.read, collection.report.skipped) == (8992, [])
    assert sum(map(collection.count, SPLITS)) == 8992
    assert not collection.released
    assert_clean(collection)
    for split in ("validation", "test"):
        assert collection.count(split) == pytest.approx(899, rel=0.15)
        shared = rows_sharing(collection, split)
        assert collection.report.counts[f"{split} rows with a candidate that also stands in train"] == shared
    groups = Counter(row["split_group"] for split in SPLITS for row in rows_of(collection, split))
    assert max(groups.values()) <= MAX_GROUP_SHARE * 8992
