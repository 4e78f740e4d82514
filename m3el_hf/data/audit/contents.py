"""What an audit counts of a folder's contents: what was read, what is missing, pictures, licences, odd texts."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

from m3el_hf.data.audit.measures import Mask
from m3el_hf.data.audit.report import ALL, Fact, Listing, Section
from m3el_hf.data.audit.scan import MISSING, NAME_LENGTH, Scan
from m3el_hf.data.audit.tally import Tally, single
from m3el_hf.data.manifest import read_unusable_images
from m3el_hf.tasks import TASKS, Modality

SKIPPED_SHOWN = 20
REASON_EXAMPLES = 3
LICENCES_SHOWN = 20


def content_sections(tally: Tally) -> list[Section]:
    """Returns the tables about the contents, in the order in which they are shown."""
    scan = tally.scan
    return [_missing(tally), _tasks(tally), _input(scan), _stored(scan), _licences(scan), _texts(scan)]


def listings(scan: Scan) -> list[Listing]:
    """Returns what was skipped and which pictures could not be had, with examples; only where there is something."""
    manifest = scan.manifest
    made = [
        ("Instances that could not be used", manifest.skipped),
        ("Entities that could not be used", manifest.entities_skipped),
        ("Pictures of the source that could not be had", _by_reason(read_unusable_images(scan.folder))),
        ("Pictures of this folder that cannot be decoded", _by_reason(dict(scan.pictures.unusable.values()))),
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


def _missing(tally: Tally) -> Section:
    m, scan = tally.measures, tally.scan
    facts = [
        tally.rows(f"no_{key}", f"mention without a {label}", "", getattr(m, key) == MISSING)
        for key, label in (("mention", "name"), ("context", "sentence"), ("picture", "picture"))
    ]
    for key, column in (("name", "label"), ("description", "description"), ("picture", "picture")):
        absent = m.choices[column] == MISSING
        if scan.is_knowledge_base:
            facts += [single(f"no_candidate_{key}", f"entity without a {key}", "", int(absent.sum()), len(absent))]
        else:
            label = f"candidate without a {key}"
            facts += [tally.rows(f"no_candidate_{key}", label, "", absent, row=m.candidate_row)]
    return Section("missing", "What is missing", "Null or blank.", list(tally.columns), facts)


def _tasks(tally: Tally) -> Section:
    m, scan = tally.measures, tally.scan
    if scan.is_knowledge_base:
        named, shown = m.of_gold("label") != MISSING, m.of_gold("picture") != MISSING
        about = "Rows of which the mention and its gold have all that a task shows, whatever other entities lack."
    else:
        named = m.all_candidates(scan.candidates["label"] != MISSING)
        shown = m.all_candidates(scan.candidates["picture"] != MISSING)
        about = "Rows of which the mention and every candidate have all that a task shows; a name suffices as text."

    def has(side: Modality, text: Mask, picture: Mask) -> Mask:
        return (text | (not side.has_text)) & (picture | (not side.has_image))

    mentions = {side: has(side, m.mention != MISSING, m.picture != MISSING) for side in Modality}
    facts = [
        tally.rows(f"task_{name}", name, "", mentions[task.mention] & has(task.candidate, named, shown))
        for name, task in TASKS.items()
    ]
    return Section("tasks", "Rows complete for each task", about, list(tally.columns), facts)


def _input(scan: Scan) -> Section:
    manifest = scan.manifest
    lost = abs(manifest.read - len(manifest.skipped) - len(scan.rows["id"]))
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
    unusable = manifest.unusable_image_count
    facts += [single("unusable_images", "pictures named but not had", "Files absent, broken, no pictures.", unusable)]
    facts += [single(f"counted: {name}", name, "", count) for name, count in manifest.counts.items()]
    return Section("input", "What was read", "Counted while the folder was built.", [ALL], facts)


def _stored(scan: Scan) -> Section:
    pictures, short = scan.pictures, scan.pictures.short_sides
    count = len(short) + len(pictures.unusable)
    flat = sum(found is None for found in pictures.hashes.values())
    structure = "One colour or plain stripes: no perceptual hash can be had, so no near-same picture is found."
    facts = [
        single("distinct_pictures", "distinct pictures", "By their bytes.", count),
        single("undecodable", "that cannot be decoded", "", len(pictures.unusable), count),
        single("unhashed", "without structure", structure, flat, count),
        single("distinct_size", "distinct pictures, in MB", "", round(pictures.size / 1e6, 1)),
        single("whole_size", "pictures of all rows and entities, in MB", "", round(pictures.size_of_all / 1e6, 1)),
    ]
    if short:
        facts += [
            single("least_side", "least short side, in pixels", "", min(short)),
            single("median_side", "median short side, in pixels", "", float(np.median(short))),
            single("most_side", "most short side, in pixels", "", max(short)),
        ]
    return Section("stored", "Pictures in this folder", "", [ALL], facts)


def _licences(scan: Scan) -> Section:
    of = scan.licences.total()
    facts = [
        single("urls", "with an address", "`image_urls` says where it came from.", scan.urls, of),
        single("unstated", "licence not stated", "`licences` is null.", scan.licences[None], of),
    ]
    stated = [(name, count) for name, count in scan.licences.items() if name is not None]
    stated.sort(key=lambda item: (-item[1], item[0]))
    facts += [single(f"licence: {name}", name, "", count, of) for name, count in stated[:LICENCES_SHOWN]]
    if rest := stated[LICENCES_SHOWN:]:
        facts += [single("other_licences", f"{len(rest)} other licences", "", sum(count for _, count in rest), of)]
    about = "Of the pictures in rows; a picture counts each time that a row shows it."
    return Section("licences", "Licences of the pictures", about, [ALL], facts)


def _texts(scan: Scan) -> Section:
    of: dict[str, float] = {kind: counts["texts"] for kind, counts in scan.texts.items()}
    control: dict[str, float] = {kind: counts["control"] for kind, counts in scan.texts.items()}
    names = ("mention", "entity name")
    signs = "Other than tab and line break; or signs that turn the direction of writing."
    facts = [
        Fact(
            "long_names", f"longer than {NAME_LENGTH} characters", "Names only.",
            {kind: scan.texts[kind]["long"] for kind in names}, {kind: of[kind] for kind in names},
        ),
        Fact("control_characters", "with control characters", signs, control, of),
    ]  # fmt: skip
    return Section("texts", "Odd texts", "Names and descriptions count once an entity.", list(of), facts)
