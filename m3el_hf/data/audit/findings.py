"""From figures to sentences: what to know before one uses a dataset, the worst first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from m3el_hf.data.audit.report import ALL, Fact, Finding, number, percent
from m3el_hf.data.manifest import Manifest
from m3el_hf.data.schema import SPLITS

SERIOUS_SHARE = 0.01
"""A flaw of fewer rows than this share moves a figure less than its interval is wide, and counts one level less."""


class Rule(NamedTuple):
    """When a fact is worth a sentence, which is whenever its count is not zero.

    Attributes:
        key: The fact.
        level: How bad it is, where it holds for `SERIOUS_SHARE` of the rows.
        text: The sentence; ``{amount}`` stands for "12 of 345 rows (3.5 %)", and for "1 of 1 rows (100 %)".
        clean: What was not found where the count is zero; empty where that is not worth saying.
        noun: What is counted.
        at_once: Whether a single one is as bad as many.
    """

    key: str
    level: int
    text: str
    clean: str = ""
    noun: str = "rows"
    at_once: bool = False


# fmt: off
def _rules(manifest: Manifest) -> list[Rule]:
    entities = "entities" if manifest.kind == "knowledge_base" else "candidates"
    removed = Rule(
        "image_is_gold", 1, "As stored, the mention's picture was the gold's, byte for byte, in {amount}; the build "
        "removed it.", noun="rows with both pictures")
    return [
        Rule("leak_group", 1 if manifest.released_splits or manifest.previous else 2, "Split groups stand in several "
             "splits, as only splits of the source or of an earlier version may leave them: {amount}.",
             "split groups in several splits"),
        Rule("leak_gold", 1 if entities == "entities" else 2, "Held-out rows share their gold with another split: "
             "{amount}. Give figures for golds seen and unseen apart.", "golds in several splits"),
        *[removed] * (manifest.protocol == "deleaked"),
        Rule("rows_lost", 3, "The folder is not what was built: {amount} got lost without a reason.",
             "lost instances", "instances", at_once=True),
        Rule("answer_wrong", 3, "`answer` does not lead to the gold in {amount}.", "wrong answers", at_once=True),
        Rule("repeated_ids", 3, "The id of an earlier row stands in {amount}.", "doubled ids", at_once=True),
        Rule("leak_whole", 3, "Mention, sentence and answer of held-out rows stand in a row of another split: "
             "{amount}.", "mentions with sentence and answer in several splits"),
        Rule("leak_sentence_picture", 3, "Sentence and picture of held-out rows stand in a row of another split: "
             "{amount}."),
        Rule("leak_sentence", 2, "Sentences of held-out rows stand in another split: {amount}.",
             "sentences in several splits"),
        Rule("leak_picture", 2, "Mention pictures of held-out rows stand in another split: {amount}.",
             "mention pictures in several splits"),
        Rule("leak_distractor_gold", 2, "Golds of held-out rows stand in another split as distractors only, where a "
             "model learns that they are never the answer: {amount}. Print a mention-blind control beside each "
             "figure.", "golds that are only distractors in another split"),
        Rule("leak_candidate", 1, "Held-out rows have a candidate that also stands in another split: {amount}.",
             "candidates in several splits"),
        Rule("same_bytes", 3, "The mention's picture is the gold's, byte for byte, in {amount}: linking picture to "
             "picture tests identity there, not recognition. Report with and without them, or build with the protocol "
             "`deleaked`.", "mention pictures that are the gold's", "rows with both pictures"),
        Rule("name_decides", 2, "The name alone decides in {amount}: only the gold has the mention's name. Print "
             "string match beside figures."),
        Rule("name_misleads", 1, "The name misleads in {amount}: only another entity has the mention's name."),
        Rule("hopeless", 2, "Nothing tells the answers apart in {amount}: same mention, sentence and picture (or "
             "none), another answer.", "rows that differ in nothing but the answer", "rows with a sentence"),
        Rule("contradictions", 1, "The same mention in the same sentence has another answer elsewhere in {amount}.",
             noun="rows with a sentence"),
        Rule("repeated_rows", 2, "An earlier row (mention, sentence, answer and picture) is repeated in {amount}.",
             "repeated rows"),
        Rule("shared_pictures", 1, "The mention's picture is also that of a row of another answer in {amount}.",
             noun="rows with a picture"),
        Rule("gold_absent", 3, "The knowledge base lacks the answer in {amount}: no system can be right there. Print "
             "that ceiling.", "answers that the knowledge base lacks"),
        Rule("nil", 1, "The answer is NIL in {amount}: say with each figure what was done with them."),
        Rule("single_candidate", 2, "The gold is the only candidate in {amount}: right without a look.",
             "rows without a choice"),
        Rule("candidate_twice", 2, "A candidate stands there twice in {amount}.", "doubled candidates"),
        Rule("skipped", 2, "{amount} could not be used; the report lists the reasons.", "skipped instances",
             "instances of the source"),
        Rule("entities_skipped", 2, "{amount} could not be used; the report lists the reasons.", "skipped entities",
             "entities of the source"),
        Rule("unusable_images", 2, "{amount} could not be had; the report lists the reasons.",
             "absent or broken picture files", "picture files that the source names"),
        Rule("undecodable", 3, "{amount} of this folder cannot be decoded.", "broken pictures in this folder",
             "distinct pictures"),
        Rule("several_names", 1, "Several names are given to {amount}.", noun="named entities"),
        Rule("several_descriptions", 1, "Several descriptions are given to {amount}.", noun="described entities"),
        Rule("entity_pictures_shared", 2, "The picture is also that of another entity for {amount}: pictures do not "
             "tell these apart.", "entities with the picture of another", "entities with a picture"),
        Rule("no_context", 1, "The mention has no sentence in {amount}.", "mentions without a sentence"),
        Rule("no_picture", 1, "The mention has no picture in {amount}.", "mentions without a picture"),
        Rule("unstated", 2, "No licence is stated for {amount}: look each up before you redistribute it.",
             noun="pictures in rows"),
        Rule("long_names", 2, "Names are so long that they may be texts of another field: {amount}.",
             "overlong names"),
        Rule("control_characters", 1, "Texts hold control characters: {amount}.", "control characters"),
        Rule("no_candidate_name", 2, "The name is missing for {amount}.", f"{entities} without a name", entities),
        Rule("no_candidate_description", 1, "The description is missing for {amount}.",
             f"{entities} without a description", entities),
        Rule("no_candidate_picture", 1, "The picture is missing for {amount}.", f"{entities} without a picture",
             entities),
    ]
# fmt: on


def findings(facts: Iterable[Fact], manifest: Manifest) -> tuple[list[Finding], list[str]]:
    """Returns what to know, the worst first, and what was looked for and not found.

    Args:
        facts: All that was counted.
        manifest: How the data was built.
    """
    known = {fact.key: fact for fact in facts}
    if known["hopeless"].counts == known["contradictions"].counts:
        del known["contradictions"]  # says no more
    rules = [rule for rule in _rules(manifest) if rule.key in known]
    ranked = [_applied(rule, known[rule.key]) for rule in rules if any(known[rule.key].counts.values())]
    ranked += [*_absent_splits(known, manifest), *_near(known), *_order(known), *_tasks(known)]
    ranked.sort(key=lambda found: (-found[0], -found[1]))
    clean = [rule.clean for rule in rules if rule.clean and _is_clean(known[rule.key])]
    return [Finding(level, text) for level, _, text in ranked], clean


Ranked = tuple[int, float, str]
"""Level, share of the rows, sentence."""


def _applied(rule: Rule, fact: Fact) -> Ranked:
    shares = [fact.share(column) for column in fact.counts]
    share = max((one for one in shares if one is not None), default=0.0)
    level = rule.level if share >= SERIOUS_SHARE or rule.at_once or not fact.of else max(1, rule.level - 1)
    text = rule.text.format(amount=_amount(fact, rule.noun))
    return level, share, text[0].upper() + text[1:]


def _amount(fact: Fact, noun: str) -> str:
    """Writes "12 of 345 rows (3.5 %)", or the same for each pair of splits, or kind of text, that has some."""
    if ALL in fact.counts:
        return _one_amount(fact, ALL, noun)
    parts = []
    for column in (name for name, count in fact.counts.items() if count):
        held, _, seen = column.partition(" / ")
        parts += [f"{_one_amount(fact, column, f'{held} rows' if seen else f'{held}s')}{f' with {seen}' * bool(seen)}"]
    return "; ".join(parts)


def _one_amount(fact: Fact, column: str, noun: str) -> str:
    share = fact.share(column)
    count = number(fact.counts[column])
    if share is None:
        return f"{count} {noun}"
    of = f"{number(fact.of[column])} {noun}"
    return f"all {of}" if share == 1 and fact.of[column] > 1 else f"{count} of {of} ({percent(share)})"


def _is_clean(fact: Fact) -> bool:
    looked = not fact.of or any(fact.of.values())
    return looked and not any(fact.counts.values())


def _absent_splits(facts: dict[str, Fact], manifest: Manifest) -> list[Ranked]:
    """Splits without a row, and why, where that can be told."""
    absent = [split for split in SPLITS if split not in facts["rows"].counts]
    groups = facts["groups"].counts[ALL]
    shared = "shared golds, sentences, pictures or candidates"
    if manifest.released_splits:
        reason = ": the source's own splits have none"
    elif groups == 1:
        reason = f": all rows hang together in one group ({shared}), and a group stays in one split"
    elif groups < len(SPLITS):
        reason = f": all rows hang together in {number(groups)} groups ({shared}), and a group stays in one split"
    else:
        reason = ""
    level = 2 if manifest.released_splits else 3  # a source may publish its test rows alone, and mean it
    return [(level, 1.0, f"There is no {' and no '.join(absent)} split{reason}.")] if absent else []


def _near(facts: dict[str, Fact]) -> list[Ranked]:
    """Near-same pictures say something only beside what chance gives."""
    near, control = facts["near_only"], facts["near_control"]
    share, chance = near.share(ALL) or 0.0, control.share(ALL) or 0.0
    if not near.counts[ALL]:
        return []
    level = 3 if share - chance >= 0.1 else 2 if share - chance >= SERIOUS_SHARE else 1
    amount = _amount(near, "rows with two comparable pictures")
    text = (
        f"The mention's picture is not the gold's, but looks the same to a perceptual hash, in {amount}; of pairs that "
        f"do not belong together, {percent(chance)} are as near."
    )
    return [(level, share, text)]


def _order(facts: dict[str, Fact]) -> list[Ranked]:
    """The gold's place, in the source and here, against a random order."""
    if "first_built" not in facts or not facts["first_built"].counts[ALL]:
        return []
    built, released = facts["first_built"], facts["first_released"]
    here, before, chance = (
        facts[key].share(ALL) or 0.0 for key in ("first_built", "first_released", "first_by_chance")
    )
    result: list[Ranked] = []
    rows = built.of[ALL]
    if rows >= 30 and here > chance + 4 * (chance * (1 - chance) / rows) ** 0.5:  # four standard errors
        amount = _amount(built, "rows")
        text = f"The gold comes first in {amount}, by chance in {percent(chance)}: ties must not go to the first."
        result.append((3, here, text))
    if released.of[ALL] >= 30 and before > chance + 0.1:
        text = f"In the source the gold comes first in {_amount(released, 'rows')}; here, shuffled, in {percent(here)}."
        result.append((1, before, text))
    return result


def _tasks(facts: dict[str, Fact]) -> list[Ranked]:
    """Which tasks no row, or not every row, is complete for."""
    tasks = {key.removeprefix("task_"): fact for key, fact in facts.items() if key.startswith("task_")}
    shares = {name: fact.share(ALL) or 0.0 for name, fact in tasks.items()}
    none = [name for name, share in shares.items() if not share]
    some = {name: share for name, share in shares.items() if 0 < share < 1}
    result: list[Ranked] = []
    if none:
        text = f"No row is complete for {len(none)} of the {len(tasks)} tasks: {', '.join(none)}."
        result.append((2, len(none) / len(tasks), text))
    if some:
        worst = min(some, key=lambda name: some[name])
        amount = _amount(tasks[worst], "rows")
        text = f"Some rows are incomplete for {len(some)} of the {len(tasks)} tasks; complete for `{worst}`: {amount}."
        result.append((1, 1 - some[worst], text))
    return result
