from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import m3el_hf
from m3el_hf.errors import M3ELError
from m3el_hf.evaluation.ranking import gold_counts, summarise
from m3el_hf.metrics import LINKING_ACCURACY, load_metric

SCORES = [[0.9, 0.1, 0.2], [0.5, 0.5], [-1.0], [1.0, 1.0 + 1e-12, 2.0, -math.inf], [3.0]]
GOLDS = [0, 1, 0, 1, -1]
RANKED = [["Q1", "Q2", "Q3"], ["Q2"], ["Q7", "Q1"], ["Q5", "Q6"]]
IDS = ["Q2", "Q2", "Q1", "Q9"]

fast = settings(deadline=None, max_examples=8)


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> evaluate.EvaluationModule:
    """As others load it, writing what is added to disk."""
    return evaluate.load(str(LINKING_ACCURACY), cache_dir=str(tmp_path_factory.mktemp("metric")))


def by_ranking(scores, golds, **options):
    return summarise(*gold_counts(scores, golds), **options)


def test_it_computes_what_ranking_does(metric):
    result = metric.compute(scores=SCORES, references=GOLDS)
    assert result == by_ranking(SCORES, GOLDS)
    assert result["accuracy"] == pytest.approx((1 + 1 / 2 + 1 + 0 + 0) / 5)
    assert (result["misses"], result["ceiling"], result["tie_share"]) == (1, 0.8, 0.2)


@fast
@given(
    st.lists(
        st.lists(st.floats(allow_nan=False, max_value=1e300), min_size=1, max_size=4), min_size=1, max_size=4
    ).flatmap(lambda rows: st.tuples(st.just(rows), st.tuples(*(st.integers(0, len(row) - 1) for row in rows))))
)
def test_no_score_changes_on_its_way(metric, table):
    scores, golds = table
    assert metric.compute(scores=scores, references=golds) == by_ranking(scores, golds)


@fast
@given(data=st.data())
def test_padding_changes_nothing(data):
    padding = st.sampled_from([math.nan, math.inf, 9.0, -1e9])
    padded = [row + data.draw(st.lists(padding, max_size=3)) for row in SCORES]
    result = load_metric("padded").compute(scores=padded, candidate_counts=list(map(len, SCORES)), references=GOLDS)
    assert result == by_ranking(SCORES, GOLDS)


@pytest.mark.parametrize("array", [np.array, lambda rows: torch.from_numpy(np.array(rows))])
def test_padded_arrays_are_taken(array):
    width = max(map(len, SCORES))
    padded = array([row + [math.nan] * (width - len(row)) for row in SCORES])
    counts, golds = array(list(map(len, SCORES))), array(GOLDS)
    result = load_metric("padded").compute(scores=padded, candidate_counts=counts, references=golds)
    assert result["mrr"] == pytest.approx(by_ranking(SCORES, GOLDS)["mrr"])


def test_ranked_ids_are_scores_that_fall():
    result = load_metric("ranked").compute(predictions=RANKED, references=IDS)
    falling = [[-float(place) for place in range(len(row))] for row in RANKED]
    places = [row.index(gold) if gold in row else -1 for row, gold in zip(RANKED, IDS, strict=True)]
    assert result == by_ranking(falling, places)
    assert (result["mrr"], result["mean_rank"], result["misses"]) == ((1 / 2 + 1 + 1 / 2) / 4, 5 / 3, 1)


def test_a_single_id_is_a_list_of_one():
    single = load_metric("ranked").compute(predictions=["Q1", "Q10", ["Q2", "Q1"]], references=["Q1", "Q1", "Q1"])
    assert single == load_metric("ranked").compute(predictions=[["Q1"], ["Q10"], ["Q2", "Q1"]], references=["Q1"] * 3)
    assert single["accuracy"] == pytest.approx(1 / 3)


def test_ids_may_be_numbers():
    numbers = load_metric("ranked")
    assert numbers.compute(predictions=[[1, 12], [3]], references=[12, 4])["mrr"] == 0.25
    assert numbers.compute(predictions=np.array([1, 3]), references=np.array([1, 4]))["accuracy"] == 0.5


def test_k_and_ties_are_chosen_when_computing(metric):
    options = {"ks": [2, 4], "ties": "pessimistic"}
    assert metric.compute(scores=SCORES, references=GOLDS, **options) == by_ranking(SCORES, GOLDS, **options)


def test_batches_and_single_rows_add_up(metric):
    expected = by_ranking(SCORES, GOLDS)
    metric.add_batch(scores=SCORES[:1], references=GOLDS[:1])
    metric.add_batch(scores=SCORES[1:], references=GOLDS[1:])
    assert metric.compute() == expected
    for scores, gold in zip(SCORES, GOLDS, strict=True):
        metric.add(scores=scores, references=gold)
    assert metric.compute() == expected
    metric.add_batch(scores=SCORES[:2], references=GOLDS[:2])
    assert metric.compute(scores=SCORES[2:], references=GOLDS[2:]) == expected


def test_single_ranked_rows_add_up():
    ranked = load_metric("ranked")
    for ids, gold in zip(RANKED, IDS, strict=True):
        ranked.add(prediction=ids, reference=gold)
    assert ranked.compute() == load_metric("ranked").compute(predictions=RANKED, references=IDS)


def test_two_at_once_do_not_mix():
    one, other = load_metric(), load_metric()
    one.add_batch(scores=[[1.0, 0.0]], references=[0])
    other.add_batch(scores=[[1.0, 0.0]] * 2, references=[1, 1])
    assert (one.compute()["accuracy"], other.compute()["accuracy"]) == (1, 0)


def test_arrays_are_taken():
    scores = [np.array([0.5, 0.25]), np.array([0.0, 0.5, 0.25])]
    assert load_metric().compute(scores=scores, references=[0, 1])["accuracy"] == 1
    assert load_metric().compute(scores=torch.eye(3), references=torch.arange(3))["accuracy"] == 1


def measure_a_share(cache: Path, process: int, rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """What one process of two does."""
    options = {"num_process": 2, "process_id": process, "experiment_id": "both", "cache_dir": str(cache)}
    metric = evaluate.load(str(LINKING_ACCURACY), "ranked", **options)
    for row in rows:
        metric.add_batch(**{name: [value] for name, value in row.items()})
    return metric.compute()


def test_two_processes_have_the_figures_of_one(tmp_path):
    rows = [{"predictions": ids, "references": gold} for ids, gold in zip(RANKED, IDS, strict=True)]
    # Forked, since a fresh interpreter needs seconds to import evaluate.
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        shares = [pool.submit(measure_a_share, tmp_path, *share) for share in enumerate((rows[:1], rows[1:]))]
        main, other = (share.result(timeout=60) for share in shares)
    assert main == load_metric("ranked").compute(predictions=RANKED, references=IDS)
    assert other is None


def test_it_stands_in_a_combination():
    both = evaluate.combine({"scores": load_metric(), "padded": load_metric("padded")})
    counts = list(map(len, SCORES))
    both.add_batch(scores=SCORES[:2], candidate_counts=counts[:2], references=GOLDS[:2])
    both.add_batch(scores=SCORES[2:], candidate_counts=counts[2:], references=GOLDS[2:])
    result = both.compute()
    assert result["scores_mrr"] == result["padded_mrr"] == by_ranking(SCORES, GOLDS)["mrr"]


def test_a_combination_passes_its_inputs_on():
    same = evaluate.combine({"one": load_metric("ranked"), "other": load_metric("ranked")})
    result = same.compute(predictions=RANKED, references=IDS)
    assert result["one_accuracy"] == result["other_accuracy"] == 0.25


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (None, {"scores": [[0.0, math.nan]], "references": [0]}, "row 0 has a NaN"),
        (None, {"scores": [[0.0], [math.inf]], "references": [0, 0]}, "row 1 has a NaN or infinite"),
        (None, {"scores": [[1.0]], "references": [1]}, "row 0 has reference 1"),
        (None, {"scores": [[1.0], [2.0]], "references": [0, -2]}, "row 1 has reference -2"),
        (None, {"scores": [[]], "references": [0]}, "row 0 has no candidates"),
        (None, {"scores": [[1.0], None], "references": [0, 0]}, "row 1 of the scores"),
        (None, {"scores": [[1.0]], "references": [0.7]}, "references must be whole numbers"),
        (None, {"scores": [[1.0]], "references": [None]}, "references must be whole numbers"),
        (None, {"scores": [[1.0]], "references": [0, 0]}, "of different lengths .1 scores, 2 references"),
        (None, {"scores": [[1.0]]}, "references missing: the config 'default' takes scores, references"),
        (None, {"scores": [], "references": []}, "no rows"),
        (
            "padded",
            {"scores": [[1.0, 2.0]], "candidate_counts": [3], "references": [0]},
            "row 0 has candidate count 3, but 2 scores",
        ),
        ("padded", {"scores": [[1.0]], "candidate_counts": [-1], "references": [0]}, "row 0 has candidate count -1"),
        ("padded", {"scores": [[1.0]], "candidate_counts": [0], "references": [0]}, "row 0 has no candidates"),
        ("padded", {"scores": [[1.0]], "candidate_counts": [1.0], "references": [0]}, "counts must be whole numbers"),
        (
            "padded",
            {"scores": [[1.0, 2.0]], "candidate_counts": [1], "references": [1]},
            "row 0 has reference 1, but 1 candidates",
        ),
        ("padded", {"scores": [[1.0]], "references": [0]}, "candidate_counts"),
        ("ranked", {"predictions": ["Q1", None], "references": ["Q1", "Q2"]}, "row 1 has no prediction"),
        ("ranked", {"predictions": [["Q1"], []], "references": ["Q1", "Q2"]}, "row 1 has no prediction"),
        ("ranked", {"predictions": [["Q1"]], "references": ["Q1", "Q2"]}, "1 predictions, 2 references"),
        ("ranked", {"predictions": [["Q1", "Q2", "Q1"]], "references": ["Q2"]}, "row 0 ranks Q1 twice"),
        ("ranked", {"predictions": [["Q1", None]], "references": ["Q1"]}, "row 0 has None for an id"),
        ("ranked", {"predictions": [["Q1"]], "references": [None]}, "row 0 has None for an id"),
        ("ranked", {"predictions": [[0.5]], "references": ["Q1"]}, "row 0 has 0.5 for an id"),
    ],
)
def test_what_has_no_rank_is_an_error_of_one_line(config, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_metric(config).compute(**inputs)
    assert "\n" not in str(caught.value)


def test_inputs_of_another_config_are_an_error():
    with pytest.raises(M3ELError, match="predictions not known: the config 'default' takes scores, references"):
        load_metric().add_batch(scores=[[1.0]], predictions=["Q1"], references=[0])
    with pytest.raises(M3ELError, match="there is no config 'ids': choose default, padded, ranked"):
        load_metric("ids")


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_after_a_mistake_what_was_added_before_still_counts_once(keep_in_memory, tmp_path):
    metric = evaluate.load(str(LINKING_ACCURACY), keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    metric.add_batch(scores=SCORES[:2], references=GOLDS[:2])
    for wrong in ({"scores": [[1.0], [math.nan]], "references": [0, 0]}, {"scores": [[1.0]], "references": [5]}):
        with pytest.raises(M3ELError):
            metric.add_batch(**wrong)
    with pytest.raises(M3ELError):
        metric.add(scores=[], references=0)
    with pytest.raises(M3ELError):
        metric.compute(scores=[[1.0]], references=[5])
    metric.add_batch(scores=SCORES[2:], references=GOLDS[2:])
    assert metric.compute() == by_ranking(SCORES, GOLDS)


def test_the_examples_of_its_description_are_true(metric):
    assert metric.compute(scores=[[0.9, 0.1, 0.2], [0.5, 0.5]], references=[0, 1])["accuracy"] == 0.75
    assert "0.75" in metric.inputs_description
    ranked = m3el_hf.load_metric("ranked")
    assert ranked.compute(predictions=[["Q1", "Q2"], ["Q3"]], references=["Q2", "Q9"])["mrr"] == 0.25
    assert "0.25" in metric.inputs_description
    card = (LINKING_ACCURACY / "README.md").read_text()
    assert all(f"`{name}`" in card for name in metric.compute(scores=SCORES, references=GOLDS))


def test_its_inputs_are_those_of_its_config(metric):
    assert set(metric.features) == {"scores", "references"}
    assert set(load_metric("padded").features) == {"scores", "candidate_counts", "references"}
    assert set(load_metric("ranked").features) == {"predictions", "references"}


def test_the_folder_is_a_space():
    _, yaml_block, card = (LINKING_ACCURACY / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(yaml_block)
    assert facts["sdk"] == "gradio"
    assert (LINKING_ACCURACY / facts["app_file"]).is_file()
    assert {"evaluate", "metric"} <= set(facts["tags"])
    assert len(facts["short_description"]) <= 60, "the Hub takes no more"
    assert (LINKING_ACCURACY / "requirements.txt").read_text().split() == ["m3el-hf"]
    assert card.lstrip().startswith("# Linking accuracy")
