"""What an audit counts of a folder's contents: what was read, what is missing, pictures, licences, texts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import product
from typing import Any

import numpy as np

from m3el_hf.data.audit.report import ALL, Fact, Listing, Section
from m3el_hf.data.audit.scan import LONG_RATIO, MISSING, SMALL_SIDE, Scan, one_line
from m3el_hf.data.audit.tally import Tally, single
from m3el_hf.tasks import TASKS

SKIPPED_SHOWN = 20
REASON_EXAMPLES = 3
LICENCES_SHOWN = 20

NAME_LENGTH = 100
"""A longer name, in characters, is a text that a source has put into the wrong field."""


def content_sections(tally: Tally) -> list[Section]:
    """Returns the tables about the contents, in the order in which they are shown."""
    scan = tally.scan
    return [_missing(tally), _tasks(tally), _input(scan), _stored(scan), _licences(scan), _texts(scan)]


def listings(scan: Scan) -> list[Listing]:
    """Returns what was skipped and which pictures could not be had, with examples; only where there is something."""
    manifest, pictures = scan.manifest, scan.pictures
    broken = {f"{kind} {number}": pictures.unusable[key] for key, (kind, number) in pictures.places.items()
              if key in pictures.unusable}  # fmt: skip
    made = [
        ("Instances that could not be used", manifest.skipped),
        ("Entities that could not be used", manifest.entities_skipped),
        ("Pictures of the source that could not be had", _by_reason(manifest.unusable_images)),
        ("Pictures of this folder that cannot be decoded", _by_reason(broken)),
        ("The shortest and the longest texts", _extremes(scan)),
    ]
    return [Listing(title, lines[:SKIPPED_SHOWN], max(0, len(lines) - SKIPPED_SHOWN)) for title, lines in made if lines]


def _by_reason(unusable: dict[str, str]) -> list[str]:
    """Groups files by the reason, numbers in it aside, the most frequent first: a line each, with examples."""
    groups = defaultdict(list)
    for file, reason in unusable.items():
        groups[re.sub(r"\d[\d,.]*", "N", reason)].append((file, reason))
    lines = []
    for reason, found in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        reasons = {one for _, one in found}
        examples = ", ".join(file for file, _ in found[:REASON_EXAMPLES])
        more = f" and {len(found) - REASON_EXAMPLES:,} more" if len(found) > REASON_EXAMPLES else ""
        lines.append(f"{len(found):,} × {reasons.pop() if len(reasons) == 1 else reason}: {examples}{more}")
    return lines


def _extremes(scan: Scan) -> list[str]:
    return [
        f"{name}, {length:,} characters: {one_line(text)}"
        for name, facts in scan.texts.items()
        if facts.lengths
        for length, text in ((min(facts.lengths), facts.shortest), (max(facts.lengths), facts.longest))
    ]


def _missing(tally: Tally) -> Section:
    m, scan = tally.measures, tally.scan
    facts = [
        tally.rows(f"no_{key}", f"mention without a {label}", "", getattr(m, key) == MISSING)
        for key, label in (("mention", "name"), ("context", "sentence"), ("picture", "picture"))
    ]
    for key, column in (("name", "label"), ("description", "description"), ("picture", "picture")):
        if scan.is_knowledge_base:
            absent, label = getattr(scan.entities, column) == MISSING, f"entity without a {key}"
            facts += [single(f"no_candidate_{key}", label, "", int(absent.sum()), len(absent))]
        else:
            absent, label = getattr(scan.candidates, column) == MISSING, f"candidate without a {key}"
            every = np.ones_like(absent)
            facts += [tally.pairs(f"no_candidate_{key}", label, "", absent, every, m.candidate_row)]
    return Section("missing", "What is missing", "Null or blank.", tally.columns, facts)


def _tasks(tally: Tally) -> Section:
    m, scan = tally.measures, tally.scan
    if scan.is_knowledge_base:
        named, shown = m.of_gold("label") != MISSING, m.of_gold("picture") != MISSING
        about = "Rows of which the mention and its gold have all that a task shows, whatever other entities lack."
    else:
        named = m.all_candidates(scan.candidates.label != MISSING)
        shown = m.all_candidates(scan.candidates.picture != MISSING)
        about = "Rows of which the mention and every candidate have all that a task shows; a name suffices as text."
    state = (m.mention != MISSING) * 8 + (m.picture != MISSING) * 4 + named * 2 + shown
    facts = []
    for name, task in TASKS.items():
        fitting = [number for number, row in enumerate(_presences()) if task.fits(row)]
        facts += [tally.rows(f"task_{name}", name, "", np.isin(state, fitting))]
    return Section("tasks", "Rows complete for each task", about, tally.columns, facts)


def _presences() -> list[dict[str, Any]]:
    """A row for each combination of: mention named, mention shown, candidates named, candidates shown."""
    return [
        {
            "mention": "name" * mention,
            "mention_image": b"" if image else None,
            "candidate_names": ["name" * names],
            "candidate_images": [b"" if images else None],
        }
        for mention, image, names, images in product((0, 1), repeat=4)
    ]


def _input(scan: Scan) -> Section:
    manifest = scan.manifest
    lost = abs(manifest.read - len(manifest.skipped) - len(scan.rows))
    facts = [
        single("read", "instances read", "Mentions found in the source.", manifest.read),
        single("skipped", "instances skipped", "Listed below with reasons.", len(manifest.skipped), manifest.read),
        single("rows_lost", "instances unaccounted for", "Neither a row here nor skipped.", lost, manifest.read),
    ]
    if scan.is_knowledge_base:
        skipped = len(manifest.entities_skipped)
        facts += [
            single("entities_read", "entities read", "Found in the source.", manifest.entities_read),
            single("entities_skipped", "entities skipped", "Likewise.", skipped, manifest.entities_read),
        ]
    unusable = len(manifest.unusable_images)
    facts += [single("unusable_images", "pictures named but not had", "Files absent, broken, no pictures.", unusable)]
    facts += [single(f"counted: {name}", name, "", count) for name, count in manifest.counts.items()]
    return Section("input", "What was read", "Counted while the folder was built.", [ALL], facts)


def _stored(scan: Scan) -> Section:
    pictures = scan.pictures
    count, sizes = len(pictures.places), list(pictures.sizes.values())
    short = [min(size) for size in sizes]
    structure = "One colour or plain stripes: no perceptual hash can be had, so no near-same picture is found."
    facts = [
        single("distinct_pictures", "distinct pictures", "By their bytes.", count),
        single("undecodable", "that cannot be decoded", "", len(pictures.unusable), count),
        single("unhashed", "without structure", structure, len(pictures.flat), count),
        single("small_pictures", f"with a short side under {SMALL_SIDE} pixels", "", len(pictures.small), count),
        single(
            "long_pictures", f"with a long side over {LONG_RATIO} times the short one", "", len(pictures.long), count
        ),
    ]
    if short:
        facts += [
            single("least_side", "least short side, in pixels", "", min(short)),
            single("median_side", "median short side, in pixels", "", float(np.median(short))),
            single("most_side", "most short side, in pixels", "", max(short)),
            single("distinct_size", "distinct pictures, in MB", "", round(pictures.size / 1e6, 1)),
            single("whole_size", "pictures of all rows and entities, in MB", "", round(pictures.size_of_all / 1e6, 1)),
        ]
    return Section("stored", "Pictures in this folder", "", [ALL], facts)


def _licences(scan: Scan) -> Section:
    of = scan.licences.total()
    facts = [
        single("urls", "with an address", "`image_urls` says where it came from.", scan.urls, of),
        single("unstated", "licence not stated", "`licences` is null.", scan.licences[None], of),
    ]
    stated = sorted(
        ((name, count) for name, count in scan.licences.items() if name is not None),
        key=lambda item: (-item[1], item[0]),
    )
    facts += [single(f"licence: {name}", name, "", count, of) for name, count in stated[:LICENCES_SHOWN]]
    if rest := stated[LICENCES_SHOWN:]:
        facts += [single("other_licences", f"{len(rest)} other licences", "", sum(count for _, count in rest), of)]
    about = "Of the pictures in rows; a picture counts each time that a row shows it."
    return Section("licences", "Licences of the pictures", about, [ALL], facts)


def _texts(scan: Scan) -> Section:
    texts = {name: facts for name, facts in scan.texts.items() if facts.lengths}
    of: dict[str, float] = {name: facts.lengths.total() for name, facts in texts.items()}
    names = [(name, facts) for name, facts in texts.items() if name in ("mention", "entity name")]
    facts = [
        Fact("texts", "texts", "Not null.", of),
        Fact("shortest", "shortest, in characters", "", {name: min(facts.lengths) for name, facts in texts.items()}),
        Fact("median", "median", "", {name: _median(facts.lengths) for name, facts in texts.items()}),
        Fact("longest", "longest", "", {name: max(facts.lengths) for name, facts in texts.items()}),
        Fact(
            "long_names",
            f"longer than {NAME_LENGTH}",
            "Names only.",
            {
                name: sum(count for length, count in found.lengths.items() if length > NAME_LENGTH)
                for name, found in names
            },
            {name: of[name] for name, _ in names},
        ),
        Fact(
            "control_characters",
            "with control characters",
            "Other than tab and line break; or signs that turn the direction of writing.",
            {name: facts.control for name, facts in texts.items()},
            of,
        ),
        Fact(
            "right_to_left",
            "with right-to-left script",
            "",
            {name: facts.right_to_left for name, facts in texts.items()},
            of,
        ),
    ]
    return Section("texts", "Texts", "Names and descriptions count once an entity.", list(texts), facts)


def _median(lengths: Counter[int]) -> float:
    sizes = np.array(sorted(lengths))
    return float(np.median(np.repeat(sizes, [lengths[int(size)] for size in sizes])))
