"""What an audit counts of rows: shortcuts to the gold, shared things, contradictions."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np

from m3el_hf.data.audit.measures import Mask, Measures, mix, repeats, several, within
from m3el_hf.data.audit.report import ALL, Fact, Section
from m3el_hf.data.audit.scan import MISSING, Digests
from m3el_hf.data.audit.tally import Tally, single
from m3el_hf.data.perceptual import NEAR_SAME
from m3el_hf.data.rows import SAME_FILE

COUNTS_SHOWN = 12
"""Rows are counted by their number of candidates for this many numbers, at most."""


def row_sections(tally: Tally) -> list[Section]:
    """Returns the tables about rows, in the order in which they are shown."""
    made = [_rows(tally), _pictures(tally), _names(tally)]
    made += [_knowledge_base(tally)] if tally.scan.is_knowledge_base else [_position(tally), _candidates(tally)]
    made += [_leaks(tally)] if len(tally.measures.splits) > 1 else []
    return [*made, _duplicates(tally), _entities(tally)]


def _rows(tally: Tally) -> Section:
    m, scan, columns = tally.measures, tally.scan, tally.columns
    facts = [
        Fact(f"rows_{topic}", topic, "", tally.by_column(m.topic == number)) for number, topic in enumerate(scan.topics)
    ]
    golds = {name: m.gold[rows & (m.nil == 0)] for name, rows in columns.items()}
    groups = {name: m.group[rows] for name, rows in columns.items()}
    together = (
        "Rows that share a gold, a sentence or a mention picture, and while groups stay small a candidate. The splits "
        "made here take a group as a whole."
    )
    facts += [
        Fact("rows", "all rows", "A row is one mention.", tally.by_column(columns[ALL])),
        tally.distinct("groups", "split groups", together, groups),
        tally.distinct("golds", "entities that are a gold", "NIL is none.", golds),
    ]
    if scan.is_knowledge_base:
        facts += [single("entities", "entities in the knowledge base", "", len(scan.entities["qid"]))]
    else:
        candidates = {name: scan.candidates["qid"][rows[m.candidate_row]] for name, rows in columns.items()}
        others = {name: found[~np.isin(found, golds[name])] for name, found in candidates.items()}
        only = "Entities that are nowhere the gold: to learn that they never are needs no mention."
        facts += [
            tally.distinct("entities", "entities among the candidates", "", candidates),
            tally.distinct("distractors_only", "of these, distractors only", only, others),
        ]
    return Section("rows", "Rows", "", list(columns), facts)


def _pictures(tally: Tally) -> Section:
    m, manifest = tally.measures, tally.scan.manifest
    gold, compared = m.of_gold("picture"), m.gold_distance >= 0
    other = "another row's gold" if tally.scan.is_knowledge_base else "a distractor"
    facts = [
        tally.rows(
            "image_is_gold", "the same bytes, as stored",
            "`mention_image_is_gold`: the build compares both pictures after it has reduced them; of the rows where it "
            "is not null. Under the protocol `deleaked` these mentions have lost their picture.",
            m.image_is_gold == 1, m.image_is_gold >= 0,
        ),
        tally.rows(
            "same_bytes", "the same bytes, still here", "Of the rows that have both pictures here.",
            m.picture == gold, (m.picture != MISSING) & (gold != MISSING),
        ),
        tally.rows(
            "near", "near-same, or the same",
            f"The perceptual hashes differ in at most {NEAR_SAME} of 64 bits; of the rows with two pictures that have "
            "one. A copy that was resized or compressed again is near-same; so is the same drawing in another colour.",
            m.near, compared,
        ),
        tally.rows(
            "near_only", "near-same, but not the same bytes", "Of the same rows.",
            m.near & (m.picture != gold), compared,
        ),
        tally.rows(
            "near_control", f"control: near-same to {other}",
            f"Of the pairs of a mention's picture and that of {other}: what likeness alone gives, without any leak.",
            m.control_distance <= NEAR_SAME, m.control_distance >= 0, m.control[0],
        ),
    ]  # fmt: skip
    if manifest.source is not None:  # generated pictures lie in no files
        definition = "The source names one file for both. Counted while the folder was built."
        same = single("same_file", "one file in the source", definition, manifest.counts.get(SAME_FILE, 0), len(gold))
        facts.insert(0, same)
    about = "How many rows can be linked by recognising a picture again, which is no linking."
    return Section("pictures", "Mention picture and gold picture", about, list(tally.columns), facts)


def _names(tally: Tally) -> Section:
    m = tally.measures
    named, one = m.name != MISSING, m.equal_names == 1
    entity = "entity of the knowledge base" if tally.scan.is_knowledge_base else "candidate"
    what = f"{entity} has the mention's name"
    facts = [
        tally.rows(
            "name_is_gold", "the gold has the mention's name",
            "`mention_name_is_gold` is true; of the rows where it is not null.",
            m.name_is_gold == 1, m.name_is_gold >= 0,
        ),
        tally.rows("name_decides", "the name alone decides", f"One {what}: the gold.", one & m.gold_name_equal, named),
        tally.rows("name_misleads", "the name misleads", f"One {what}: not the gold.", one & ~m.gold_name_equal, named),
        tally.rows("names_several", "several have the name", f"More than one {what}.", m.equal_names > 1, named),
        tally.rows("names_none", "none has the name", f"No {what}.", m.equal_names == 0, named),
    ]  # fmt: skip
    about = "Names are equal if they are the same letters, whatever their case and the space around them."
    return Section("names", "Names", about, list(tally.columns), facts)


def _knowledge_base(tally: Tally) -> Section:
    m = tally.measures
    absent = (m.gold_entity < 0) & (m.nil == 0)
    facts = [
        tally.rows("nil", "NIL", "The source says that the knowledge base has no such entity.", m.nil == 1),
        tally.rows("gold_absent", "gold absent", "The answer is no NIL, and the knowledge base lacks it.", absent),
    ]
    return Section("knowledge_base", "Answers and the knowledge base", "", list(tally.columns), facts)


def _position(tally: Tally) -> Section:
    m = tally.measures
    built = m.answer >= 0
    chances = built / np.maximum(m.count, 1)
    by_chance: dict[str, float] = {name: float(chances[rows].sum()) for name, rows in tally.columns.items()}
    facts = [
        tally.rows("first_released", "the gold came first in the source", "", m.released == 0, m.released >= 0),
        tally.rows("first_built", "the gold comes first here", "", m.answer == 0, built),
        Fact("first_by_chance", "it would by chance", "", by_chance, tally.by_column(built)),
    ]
    about = "Where the gold always comes first, a model that scores all alike is right wherever ties go to the first."
    return Section("position", "Position of the gold", about, list(tally.columns), facts)


def _candidates(tally: Tally) -> Section:
    m, qids = tally.measures, tally.scan.candidates["qid"]
    kinds = (
        ("least_candidates", "fewest", np.min),
        ("median_candidates", "median", np.median),
        ("most_candidates", "most", np.max),
    )
    facts = [
        Fact(key, label, "", {name: float(function(m.count[rows])) for name, rows in tally.columns.items()})
        for key, label, function in kinds
    ]
    facts += [
        tally.rows(f"candidates_{number}", f"rows with {number}", "", m.count == number)
        for number in np.unique(m.count)[:COUNTS_SHOWN]
    ]
    twice = repeats(mix(m.candidate_row.astype(np.uint64), qids)) & (qids != MISSING)
    facts += [
        tally.rows("single_candidate", "no choice", "One candidate, or none: right without a look.", m.count < 2),
        tally.rows(
            "answer_wrong", "wrong answers", "`answer` does not lead to `answer_qid`.", m.of_gold("qid") != m.gold
        ),
        tally.rows("candidate_twice", "a candidate twice", "Two candidates of one Qid.", m.any_candidate(twice)),
    ]
    return Section("candidates", "Candidates of a row", "", list(tally.columns), facts)


_LEAKS = {
    "group": ("split group", "`split_group`: 0 where all splits were made here; given ones may share some."),
    "gold": ("gold", "The answer is an answer there; NIL is none."),
    "distractor_gold": ("gold, as a distractor only", "The answer stands there, and never as the answer."),
    "candidate": ("any candidate", "Gold or distractor."),
    "sentence": ("sentence", "Letter by letter."),
    "picture": ("mention picture", "Byte for byte."),
    "sentence_picture": ("sentence and mention picture", "Both, in one row."),
    "whole": ("mention, sentence and answer", "All three, in one row: it can be looked up."),
}


def _leaks(tally: Tally) -> Section:
    m = tally.measures
    columns: list[str] = []
    counts: dict[str, dict[str, float]] = defaultdict(dict)
    of: dict[str, dict[str, float]] = defaultdict(dict)
    for seen, held in combinations(m.splits, 2):
        column = f"{held} / {seen}"
        columns += [column]
        for key, (mask, known) in _shared(m, m.splits[seen], m.splits[held]).items():
            counts[key][column], of[key][column] = int(mask.sum()), int(known.sum())
    facts = [Fact(f"leak_{key}", *_LEAKS[key], counts[key], of[key]) for key in _LEAKS if key in counts]
    about = (
        "“test / train” counts the rows of test that share something with any row of train, of the rows of test that "
        "have such a thing."
    )
    return Section("leaks", "What splits share", about, columns, facts)


def _shared(m: Measures, seen: Mask, held: Mask) -> dict[str, tuple[Mask, Mask]]:
    """Which held-out rows share something with the rows seen, and which have it at all."""
    gold = _where(m.nil == 0, m.gold)
    whole = _where(m.said != MISSING, mix(m.said, m.gold))
    both = _where((m.context != MISSING) & (m.picture != MISSING), mix(m.context, m.picture))
    columns = {"group": m.group, "gold": gold, "sentence": m.context, "picture": m.picture}
    columns |= {"sentence_picture": both, "whole": whole}
    shared = {key: (within(values[held], values[seen]), values[held] != MISSING) for key, values in columns.items()}
    if not m.scan.is_knowledge_base:
        qids = m.scan.candidates["qid"]
        there = qids[seen[m.candidate_row]]
        as_gold, known = shared["gold"]
        shared["candidate"] = m.any_candidate(within(qids, there))[held], m.count[held] > 0
        shared["distractor_gold"] = within(gold[held], there) & ~as_gold, known
    return shared


def _where(known: Mask, digests: Digests) -> Digests:
    """Returns digests, and `MISSING` where nothing is known."""
    return np.where(known, digests, np.uint64(MISSING))


def _duplicates(tally: Tally) -> Section:
    m = tally.measures
    said, seen = m.said, _where(m.said != MISSING, mix(m.said, m.picture))
    id_ = "The id of an earlier row. Where ids are positions in the source's files, a row that moves gets another."
    facts = [
        tally.rows("repeated_ids", "ids that were there before", id_, repeats(m.id)),
        tally.rows(
            "repeated_rows", "rows that were there before",
            "The mention, sentence, answer and picture of an earlier row.",
            repeats(mix(m.mention, m.context, m.gold, m.picture)),
        ),
        tally.rows(
            "contradictions", "one mention and sentence, several answers",
            "Rows that have both in common with a row of another answer; of the rows with both.",
            several(said, m.gold), said != MISSING,
        ),
        tally.rows(
            "hopeless", "and the same picture, or none",
            "Rows that have the picture in common with such a row too: nothing that they show tells the answers apart.",
            several(seen, m.gold), said != MISSING,
        ),
        tally.rows(
            "shared_pictures", "one mention picture, several answers",
            "Rows whose mention picture is, byte for byte, also that of a row of another answer.",
            several(m.picture, m.gold), m.picture != MISSING,
        ),
    ]  # fmt: skip
    return Section("duplicates", "Duplicates and contradictions", "", list(tally.columns), facts)


def _entities(tally: Tally) -> Section:
    parts = (tally.scan.candidates, tally.scan.entities)
    qids, labels, texts, pictures = (
        np.concatenate([part[name] for part in parts]) for name in ("qid", "label", "description", "picture")
    )

    def fact(key: str, label: str, definition: str, mask: Mask, of: Mask) -> Fact:
        counts = (len(np.unique(qids[rows & (qids != MISSING)])) for rows in (mask, of))
        return single(key, label, definition, *counts)

    facts = [
        fact("several_names", "several names", "One Qid, different names.", several(qids, labels), labels != MISSING),
        fact(
            "several_descriptions", "several descriptions", "One Qid, different descriptions.",
            several(qids, texts), texts != MISSING,
        ),
        fact(
            "entity_pictures_shared", "the picture of another", "Different Qids, the same bytes.",
            several(pictures, qids), pictures != MISSING,
        ),
    ]  # fmt: skip
    about = "Distinct entities, as rows and the list of entities show them; of those that have such a thing."
    return Section("entities", "Entities that are doubled", about, [ALL], facts)
