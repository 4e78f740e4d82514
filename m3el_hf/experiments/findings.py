"""From an experiment's evaluations to its report: figures, what they say, and what is within noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3el_hf.evaluation.examples import errors
from m3el_hf.evaluation.facts import SEEN
from m3el_hf.evaluation.measure import CONTROL, CONTROL_NOTE, MODEL
from m3el_hf.evaluation.outcomes import Evaluation, Mask
from m3el_hf.evaluation.ranking import Difference, bootstrap_interval, paired_difference, sampled_hits
from m3el_hf.evaluation.report import Column, DataTable, Estimate, Report, Setting, Value
from m3el_hf.evaluation.report.contents import ABOUT_TASKS, accuracy, mean_accuracy
from m3el_hf.experiments.conditions import CONDITIONS
from m3el_hf.experiments.config import Arm
from m3el_hf.experiments.runner import PLAIN, Look, Runner, sizes
from m3el_hf.tasks import TASKS, TOPICS

RULE = (
    "A difference counts as more than noise where its 95 % interval over the rows (whole entities drawn with "
    "replacement, each row's value averaged over the seeds) excludes zero and every seed has the same sign. All else "
    "is within noise."
)
STRONGEST_ON = {"t2t": ("string match", "character match", "BM25"), "i2i": ("image hash",)}
"""Baselines that stand beside a model, by the task on which they do."""


def run_experiment(runner: Runner) -> Report:
    """Does what an experiment needs and returns its report.

    Raises:
        M3ELError: If the data does not have what the experiment asks for, or a run was told to stop.
    """
    runner.do(_looks(runner))
    return _KINDS[runner.experiment.kind](runner)


def _looks(runner: Runner) -> list[tuple[Arm, Look]]:
    experiment = runner.experiment
    reference = experiment.arm(experiment.reference)
    if experiment.kind == "scale":
        return [(reference, Look(in_base=True))]
    looks = [(arm, PLAIN) for arm in experiment.arms]
    looks += [(reference, Look(condition=name)) for name in experiment.conditions]
    if experiment.kind == "transfer" and runner.other is not None:
        looks.append((reference, Look(on_other=True)))
    return looks


# What several seeds say together.


@dataclass(frozen=True)
class Seeds:
    """One system's values on the same rows, once a seed.

    Attributes:
        rows: ``[m]``, the rows that count.
        values: ``[S, m]``; the mean of a seed's values is its figure.
        golds: ``[m]``, the entities, of which several rows are not independent.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    golds: NDArray[Any]

    @classmethod
    def of(
        cls, evaluations: Sequence[Evaluation], system: str, task: str | None = None, where: Mask | None = None
    ) -> Seeds | None:
        """Accuracies on a task, or the mean over tasks where it is None; None where there are none."""
        found = [one.values(system, task, where=where) for one in evaluations]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found):
            return None
        rows = known[0][0]
        return cls(rows, np.stack([values for _, values in known]), evaluations[0].facts["gold"][rows])

    @property
    def estimate(self) -> Estimate:
        """The mean over seeds, its interval over rows, and the standard deviation of the seeds' figures."""
        low, high = bootstrap_interval(self.values.mean(0), self.golds)
        deviation = float(self.values.mean(1).std(ddof=1)) if len(self.values) > 1 else None
        return Estimate(float(self.values.mean()), low, high, self.values.shape[1], deviation)

    def minus(self, other: Seeds) -> Comparison:
        """Compares with another system on the same rows."""
        found = paired_difference(self.values.mean(0), other.values.mean(0), self.golds)
        return Comparison(found, np.sign(self.values.mean(1) - other.values.mean(1)).tolist())


@dataclass(frozen=True)
class Comparison:
    """A difference, and the sign that it has with each seed."""

    difference: Difference
    signs: list[float]

    @property
    def is_noise(self) -> bool:
        """Whether it is within noise, by `RULE`."""
        return self.difference.low <= 0 <= self.difference.high or len({*self.signs}) > 1

    @property
    def estimate(self) -> Estimate:
        """The difference as a figure."""
        return Estimate(self.difference.mean, self.difference.low, self.difference.high, self.difference.n)

    @property
    def verdict(self) -> str:
        """For a table."""
        return "within noise" if self.is_noise else "higher" if self.difference.mean > 0 else "lower"

    @property
    def said(self) -> str:
        """For a sentence that begins with who is compared."""
        low, high = 100 * self.difference.low, 100 * self.difference.high
        interval = f"95 % interval {low:+.1f} to {high:+.1f}, p = {self.difference.p_value:.3f}"
        points = 100 * self.difference.mean
        if self.is_noise:
            return f"differs by {points:+.1f} points, which is within noise ({interval})"
        return f"is {abs(points):.1f} points {self.verdict} ({interval})"


def percent(estimate: Estimate) -> str:
    """A figure for a sentence."""
    spread = f", ± {100 * estimate.deviation:.1f} over seeds" if estimate.deviation is not None else ""
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f} %"
    interval = f"95 % interval {100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    return f"{100 * estimate.value:.1f} % ({interval}{spread}, n = {estimate.n})"


# Arms.


def _arms(runner: Runner) -> Report:
    """Every arm on every task, and what it is better or worse by than the reference."""
    experiment = runner.experiment
    found = {arm.name: runner.evaluations(arm) for arm in experiment.arms}
    baselines = runner.baselines()
    reference = _needed(Seeds.of(found[experiment.reference], MODEL))
    answers = [f"{experiment.reference}: {percent(reference.estimate)}, the mean over the tasks."]
    for arm in experiment.arms:
        if arm.name != experiment.reference:
            compared = _needed(Seeds.of(found[arm.name], MODEL)).minus(reference)
            answers.append(f"{arm.name} {compared.said}.")
    tables = (_arm_table(runner, found, baselines), _difference_table(runner, found))
    return _report(runner, answers, tables, example_of=experiment.reference)


def _arm_table(runner: Runner, found: dict[str, list[Evaluation]], baselines: Evaluation) -> DataTable:
    tasks = [task.name for task in baselines.tasks]
    rows: list[tuple[Value, ...]] = []
    for name in baselines.systems:
        cells = [accuracy(baselines, name, task) for task in tasks]
        rows.append((name, mean_accuracy(baselines, name), None, *cells))
    for name, evaluations in found.items():
        cells = [_estimate(evaluations, MODEL, task) for task in tasks]
        control = _estimate(evaluations, CONTROL)
        rows.append((name, _estimate(evaluations, MODEL), control, *cells))
    columns = [Column("mean", "%", is_strong=True), Column(CONTROL, "%"), *(Column(task, "%") for task in tasks)]
    return DataTable(
        key="arms",
        title="Accuracy",
        about=f"Accuracy in %, the mean over seeds, with 95 % intervals over rows and ± the standard deviation over "
        f"seeds. {ABOUT_TASKS} The control's column is its mean over the tasks.",
        setting=_setting(runner),
        columns=(Column("model"), *columns),
        rows=tuple(rows),
        tags=tuple({"system": str(row[0])} for row in rows),
        chart="bars",
        chance=_chance(baselines),
    )


def _difference_table(runner: Runner, found: dict[str, list[Evaluation]]) -> DataTable:
    experiment = runner.experiment
    rows: list[tuple[Value, ...]] = []
    tags = []
    for task in (None, *TASKS):
        reference = Seeds.of(found[experiment.reference], MODEL, task)
        for arm in experiment.arms:
            mine = Seeds.of(found[arm.name], MODEL, task)
            if arm.name != experiment.reference and mine is not None and reference is not None:
                compared = mine.minus(reference)
                p_value = Estimate(compared.difference.p_value)
                rows.append((arm.name, task or "mean", compared.estimate, p_value, compared.verdict))
                tags.append({"task": task} if task else {})
    return DataTable(
        key="differences",
        title=f"Differences from {experiment.reference}",
        about=f"Points of accuracy, paired by row, with 95 % intervals and the p-value of a paired randomisation test. "
        f"{RULE}",
        setting=_setting(runner),
        columns=(Column("model"), Column("task"), Column("difference", "%"), Column("p"), Column("verdict")),
        rows=tuple(rows),
        tags=tuple(tags),
    )


# Topics.


def _topics(runner: Runner) -> Report:
    """Every arm, which is trained on one topic, on each topic."""
    found = {arm.name: runner.evaluations(arm) for arm in runner.experiment.arms}
    topics = _topics_of(runner)
    rows: list[tuple[Value, ...]] = []
    home: list[float] = []
    away: list[float] = []
    for arm in runner.experiment.arms:
        cells = [_estimate(found[arm.name], MODEL, where=_on_topic(found[arm.name][0], topic)) for topic in topics]
        rows.append((arm.name, *cells))
        for topic, cell in zip(topics, cells, strict=True):
            if cell is not None:
                (home if arm.topics and topic in arm.topics else away).append(cell.value)
    answers = [
        f"On the topic that it was trained on a model reaches {100 * np.mean(home):.1f} %, on the others "
        f"{100 * np.mean(away):.1f} %: means of {len(home)} and {len(away)} cells of the matrix below, each with its "
        "own interval."
    ]
    baselines = runner.baselines()
    rows.append(("BM25 (t2t)", *(accuracy(baselines, "BM25", "t2t", _on_topic(baselines, topic)) for topic in topics)))
    table = DataTable(
        key="topics",
        title="Trained on a row's topic, tested on a column's",
        about="Mean accuracy over the tasks in %, the mean over seeds.",
        setting=_setting(runner),
        columns=(Column("trained on"), *(Column(topic, "%") for topic in topics)),
        rows=tuple(rows),
        chart="heatmap",
        summary_rows=1,
    )
    return _report(runner, answers, (table,), example_of=runner.experiment.reference)


# Transfer.


def _transfer(runner: Runner) -> Report:
    """The arms that lack a topic, on that topic, beside the reference, which has it; and another set."""
    experiment = runner.experiment
    full = runner.evaluations(experiment.arm(experiment.reference))
    rows: list[tuple[Value, ...]] = []
    answers = []
    for arm in experiment.arms:
        left_out = [topic for topic in _topics_of(runner) if arm.topics is not None and topic not in arm.topics]
        for topic in left_out:
            evaluations = runner.evaluations(arm)
            where = _on_topic(full[0], topic)
            mine, theirs = Seeds.of(evaluations, MODEL, None, where), Seeds.of(full, MODEL, None, where)
            if mine is not None and theirs is not None:
                compared = mine.minus(theirs)
                control = _estimate(evaluations, CONTROL, where=where)
                rows.append((topic, theirs.estimate, mine.estimate, compared.estimate, compared.verdict, control))
                answers.append(f"On {topic}, a model that was not trained on it {compared.said}.")
    columns = [Column("topic"), Column("trained on it", "%"), Column("not trained on it", "%")]
    columns += [Column("difference", "%"), Column("verdict"), Column(CONTROL, "%")]
    tables = [
        DataTable(
            key="held-out-topics",
            title="Topics that training has not seen",
            about=f"Mean accuracy over the tasks in %, the mean over seeds. {RULE}",
            setting=_setting(runner),
            columns=tuple(columns),
            rows=tuple(rows),
            tags=tuple({"topic": str(row[0])} for row in rows),
            chart="bars",
        )
    ]
    if runner.other is not None:
        table, answer = _other_set(runner, full)
        tables.append(table)
        answers.append(answer)
    else:
        answers.append("Another set was not measured: pass one with --other-data.")
    return _report(runner, answers, tables, example_of=experiment.reference)


def _other_set(runner: Runner, at_home: list[Evaluation]) -> tuple[DataTable, str]:
    assert runner.other is not None, "asked for where there is one"
    look = Look(on_other=True)
    away = runner.evaluations(runner.experiment.arm(runner.experiment.reference), look)
    both = ((runner.source.name, at_home, runner.baselines()), (runner.other.name, away, runner.baselines(look)))
    rows: list[tuple[Value, ...]] = []
    for name, evaluations, baselines in both:
        others = [accuracy(baselines, system, task) for task, systems in STRONGEST_ON.items() for system in systems]
        rows.append((name, _estimate(evaluations, MODEL), _estimate(evaluations, CONTROL), *others))
    names = [f"{system}, {task}" for task, systems in STRONGEST_ON.items() for system in systems]
    table = DataTable(
        key="other-set",
        title="Another set",
        about=f"The model was trained on {runner.source.name}. Mean accuracy over the tasks in %.",
        setting=_setting(runner),
        columns=(Column("measured on"), Column(MODEL, "%"), Column(CONTROL, "%"), *(Column(one, "%") for one in names)),
        rows=tuple(rows),
    )
    here, there = rows[0][1], rows[1][1]
    if not isinstance(here, Estimate) or not isinstance(there, Estimate):
        return table, f"{runner.other.name} lacks what some task shows: there is no mean over the tasks."
    return table, f"Trained on {runner.source.name}, it reaches {percent(there)} on {runner.other.name}."


# Familiarity.


def _familiarity(runner: Runner) -> Report:
    """Accuracy by how often training has met the gold."""
    arm = runner.experiment.arm(runner.experiment.reference)
    evaluations, baselines = runner.evaluations(arm), runner.baselines()
    facts = baselines.facts
    by_golds, by_rows = facts["train_golds"], facts["train_rows"]
    frequency = [("never a gold", by_golds == 0), ("once", by_golds == 1), ("twice", by_golds == 2)]
    frequency += [("3 or 4 times", (by_golds >= 3) & (by_golds <= 4)), ("5 times or more", by_golds >= 5)]
    popularity = [(f"{low} to {high} rows", (by_rows >= low) & (by_rows <= high)) for low, high in _quarters(by_rows)]
    seen = [(one, facts["seen"] == one) for one in SEEN]
    tables = [
        _bucket_table(runner, key, title, about, buckets, evaluations, baselines)
        for key, title, about, buckets in (
            ("frequency", "By how often training has the entity as a gold", "Mean accuracy over the tasks.", frequency),
            ("popularity", "By the number of training rows that list the entity", "Mean accuracy over the tasks; the "
             "entities of test rows in four parts of about one size.", popularity),
            ("seen", "By how training has met the entity", "Mean accuracy over the tasks.", seen),
        )
    ]  # fmt: skip
    answers = [
        _contrast(
            evaluations, "an entity that was a gold in training", by_golds > 0, "one that never was", by_golds == 0
        )
    ]
    middle = float(np.median(by_rows))
    answers.append(
        _contrast(
            evaluations,
            f"an entity that more than {middle:g} training rows list",
            by_rows > middle,
            "one that fewer list",
            by_rows <= middle,
        )
    )
    notes = [
        "Rows were split anew at random, so that training has met entities of test rows: these figures measure memory "
        "of entities beside linking, and are not to be compared with those of other experiments."
    ]
    return _report(runner, answers, tables, notes, example_of=arm.name)


def _bucket_table(
    runner: Runner,
    key: str,
    title: str,
    about: str,
    buckets: Sequence[tuple[str, Mask]],
    evaluations: list[Evaluation],
    baselines: Evaluation,
) -> DataTable:
    names = [f"{system}, {task}" for task, systems in STRONGEST_ON.items() for system in systems]
    rows: list[tuple[Value, ...]] = []
    for name, where in buckets:
        if where.any():
            others = [accuracy(baselines, one, task, where) for task, some in STRONGEST_ON.items() for one in some]
            model, control = (_estimate(evaluations, system, where=where) for system in (MODEL, CONTROL))
            rows.append((name, model, control, *others, int(where.sum())))
    return DataTable(
        key=key,
        title=title,
        about=about,
        setting=_setting(runner),
        columns=(
            Column("entity"),
            Column(MODEL, "%", is_strong=True),
            Column(CONTROL, "%"),
            *(Column(one, "%") for one in names),
            Column("rows"),
        ),
        rows=tuple(rows),
        chart="bars",
        chance=_chance(baselines),
    )


def _contrast(evaluations: list[Evaluation], one: str, ones: Mask, other: str, others: Mask) -> str:
    """Compares two groups of rows, which are not paired."""
    mine, theirs = (Seeds.of(evaluations, MODEL, None, where) for where in (ones, others))
    if mine is None or theirs is None:
        return f"There are no rows to compare {one} with {other}."
    difference, low, high = _unpaired(mine, theirs)
    signs = {*np.sign(mine.values.mean(1) - theirs.values.mean(1)).tolist()}
    points = f"{100 * difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    verdict = "within noise" if low <= 0 <= high or len(signs) > 1 else "more than noise"
    first, second = percent(mine.estimate), percent(theirs.estimate)
    return f"Of {one} {first} are linked, of {other} {second}: {points}, which is {verdict}."


def _unpaired(one: Seeds, other: Seeds, resamples: int = 1000) -> tuple[float, float, float]:
    """The difference of two groups' means, with its interval: entities are drawn within each group."""
    draws = []
    for number, part in enumerate((one, other)):
        means = part.values.mean(0)
        _, places = np.unique(part.golds, return_inverse=True)
        sums, counts = np.bincount(places, means), np.bincount(places)
        generator = np.random.default_rng(number)
        times = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
        draws.append(times @ sums / (times @ counts))
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    return float(one.values.mean() - other.values.mean()), float(low), float(high)


def _quarters(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges of whole numbers that hold about a quarter of the values each; fewer where few values differ."""
    ends = sorted({int(np.quantile(values, share, method="higher")) for share in (0.25, 0.5, 0.75, 1)})
    starts = [int(values.min()), *(end + 1 for end in ends[:-1])]
    return list(zip(starts, ends, strict=True))


# Conditions.


def _conditions(runner: Runner) -> Report:
    """The reference under each condition."""
    arm = runner.experiment.arm(runner.experiment.reference)
    plain = runner.evaluations(arm)
    looks = [PLAIN, *(Look(condition=name) for name in runner.experiment.conditions)]
    rows: list[tuple[Value, ...]] = []
    drops: dict[str, Comparison] = {}
    names = [f"{system}, {task}" for task, systems in STRONGEST_ON.items() for system in systems]
    for look in looks:
        evaluations, baselines = runner.evaluations(arm, look), runner.baselines(look)
        compared = _needed(Seeds.of(evaluations, MODEL)).minus(_needed(Seeds.of(plain, MODEL)))
        if look.condition:
            drops[look.condition] = compared
        cells = [_estimate(evaluations, MODEL, task) for task in (None, "t2t", "i2i", "it2it")]
        others = [accuracy(baselines, one, task) for task, some in STRONGEST_ON.items() for one in some]
        change = (compared.estimate, compared.verdict) if look.condition else (None, "")
        control = _estimate(evaluations, CONTROL)
        rows.append((look.condition or "as it is", cells[0], *change, *cells[1:], control, *others))
    columns = [Column("mean", "%", is_strong=True), Column("change", "%"), Column("verdict")]
    columns += [*(Column(task, "%") for task in ("t2t", "i2i", "it2it")), Column(CONTROL, "%")]
    table = DataTable(
        key="conditions",
        title="Under each condition",
        about="Accuracy of the model in %, the mean over seeds: the mean over the tasks, how it changes, and three "
        "tasks; then the control and baselines under the same condition. Rows count for the tasks that they fit as "
        f"they were. {RULE}",
        setting=_setting(runner),
        columns=(Column("condition"), *columns, *(Column(one, "%") for one in names)),
        rows=tuple(rows),
        tags=tuple({"condition": str(row[0])} for row in rows),
        chart="bars",
        chance=_chance(runner.baselines()),
    )
    meaning = DataTable(
        key="meaning",
        title="What is done",
        about="Each condition, and what it does to test rows. Training knows none of them.",
        setting=_setting(runner),
        columns=(Column("condition"), Column("what it does")),
        rows=tuple((name, CONDITIONS[name].about) for name in runner.experiment.conditions),
    )
    worst = sorted((name for name in drops if not drops[name].is_noise), key=lambda name: drops[name].difference.mean)
    noise = [name for name, one in drops.items() if one.is_noise]
    answers = [f"As it is: {percent(_needed(Seeds.of(plain, MODEL)).estimate)}, the mean over the tasks."]
    answers += [f"With {name} ({CONDITIONS[name].about}) it {drops[name].said}." for name in worst[:5]]
    if noise:
        answers.append(f"Within noise: {', '.join(noise)}.")
    return _report(runner, answers, (table, meaning), example_of=arm.name)


# Scale.


def _scale(runner: Runner) -> Report:
    """Accuracy among as many candidates, and how long it takes."""
    arm = runner.experiment.arm(runner.experiment.reference)
    look = Look(in_base=True)
    evaluations, baselines = runner.evaluations(arm, look), runner.baselines(look)
    counts = sizes(len(runner.source.entities))
    rows: list[tuple[Value, ...]] = []
    timings = runner.timings(arm)
    for count in counts:
        model = [_among(one, MODEL, "it2it", count) for one in evaluations]
        cells = [_of_values(model)]
        cells += [_of_values([_among(one, MODEL, task, count) for one in evaluations]) for task in ("t2t", "i2i")]
        cells += [_of_values([_among(one, CONTROL, "it2it", count) for one in evaluations])]
        cells += [
            _of_values([_among(baselines, system, task, count)])
            for task, systems in STRONGEST_ON.items()
            for system in systems
        ]
        milliseconds = [one[str(count)] for one in timings]
        rows.append((str(count), *cells, Estimate(1 / count), Estimate(float(np.mean(milliseconds)))))
    names = [f"{MODEL}, it2it", f"{MODEL}, t2t", f"{MODEL}, i2i", f"{CONTROL}, it2it"]
    names += [f"{system}, {task}" for task, systems in STRONGEST_ON.items() for system in systems]
    table = DataTable(
        key="scale",
        title="By number of candidates",
        about="Accuracy in % where the gold stands among so many entities, the others drawn at random without "
        "replacement: computed exactly from the gold's rank among all entities, so that no draw adds noise. Time: "
        "milliseconds to score one mention against so many encoded entities, all that they show, encoding left out.",
        setting=_setting(runner, "random candidates of the knowledge base"),
        columns=(
            Column("candidates"),
            *(Column(name, "%", is_strong=name == names[0]) for name in names),
            Column("chance", "%"),
            Column("ms a mention"),
        ),
        rows=tuple(rows),
        chart="lines",
    )
    first, last = rows[0][1], rows[-1][1]
    answers = []
    if isinstance(first, Estimate) and isinstance(last, Estimate):
        answers.append(
            f"With all that is shown (it2it), accuracy falls from {percent(first)} among {counts[0]} candidates to "
            f"{percent(last)} among all {counts[-1]:,} entities."
        )
    fast, slow = (float(np.mean([one[str(count)] for one in timings])) for count in (counts[0], counts[-1]))
    answers.append(f"A mention is scored in {fast:.3g} ms among {counts[0]}, in {slow:.3g} ms among {counts[-1]:,}.")
    return _report(runner, answers, (table,))


def _among(
    evaluation: Evaluation, system: str, task: str, count: int
) -> tuple[NDArray[Any], NDArray[np.float64]] | None:
    outcome = evaluation.outcomes[system].get(task)
    if outcome is None or not len(outcome.rows):
        return None
    values = sampled_hits(outcome.greater, outcome.equal, outcome.candidates, count)
    return evaluation.facts["gold"][outcome.rows], values


def _of_values(found: Sequence[tuple[NDArray[Any], NDArray[np.float64]] | None]) -> Estimate | None:
    known = [one for one in found if one is not None]
    if not known:
        return None
    golds, values = known[0][0], np.stack([values for _, values in known])
    return Seeds(np.arange(values.shape[1]), values, golds).estimate


# What all share.


def _report(
    runner: Runner,
    answers: Sequence[str],
    tables: Sequence[DataTable],
    notes: Sequence[str] = (),
    example_of: str | None = None,
) -> Report:
    examples = []
    if example_of is not None:
        arm, seed = runner.experiment.arm(example_of), runner.options.seeds[0]
        evaluation = runner.evaluations(arm)[0]
        examples = errors(evaluation, runner.model(arm, seed), runner.source.rows)
    seeds = len(runner.options.seeds)
    about_seeds = (
        f"Each model was trained with {seeds} seeds; so few say little of what another seed would do."
        if seeds > 1
        else "Each model was trained with one seed: what another would do is not known, and no difference is sure."
    )
    return Report(
        title=runner.experiment.title,
        question=runner.experiment.question,
        answers=tuple(answers),
        tables=tuple(tables),
        examples=tuple(examples),
        notes=(*notes, CONTROL_NOTE, about_seeds),
        provenance=runner.provenance,
    )


def _setting(runner: Runner, protocol: str = "candidate set, as released") -> Setting:
    split = runner.options.split + (", split by row" if runner.experiment.split_by_row else "")
    return Setting(split, protocol, "expected rank", ", ".join(map(str, runner.options.seeds)))


def _estimate(
    evaluations: list[Evaluation], system: str, task: str | None = None, where: Mask | None = None
) -> Estimate | None:
    found = Seeds.of(evaluations, system, task, where)
    return None if found is None else found.estimate


def _needed(found: Seeds | None) -> Seeds:
    assert found is not None, "a model scores every task that some row fits"
    return found


def _chance(baselines: Evaluation) -> float | None:
    return baselines.mean("chance")


def _topics_of(runner: Runner) -> list[str]:
    known = set(runner.source.rows["topic"])
    return [topic for topic in TOPICS if topic in known] + sorted(known - {*TOPICS})


def _on_topic(evaluation: Evaluation, topic: str) -> Mask:
    on: Mask = evaluation.facts["topic"] == topic
    return on


_KINDS: dict[str, Callable[[Runner], Report]] = {
    "arms": _arms,
    "topics": _topics,
    "transfer": _transfer,
    "familiarity": _familiarity,
    "conditions": _conditions,
    "scale": _scale,
}
