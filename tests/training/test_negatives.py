from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset

from m3el_hf.data.collator import LinkingCollator, candidates_of, undecoded
from m3el_hf.data.schema import ROW_FEATURES
from m3el_hf.training import negatives
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import TrainingCollator
from m3el_hf.training.loop import _Run, train
from m3el_hf.training.negatives import HardNegatives
from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def rows(data) -> Dataset:
    """Rows of which some lack pictures and descriptions that others have of the same entity, and some have none."""
    plain = list(undecoded(data["train"].select(range(40))))
    for number, row in enumerate(plain):
        if number % 4 == 1:
            row["candidate_images"] = [None, *row["candidate_images"][1:]]
            row["mention_image"] = None
        if number % 4 == 2:
            row["candidate_descriptions"] = [*row["candidate_descriptions"][:-1], None]
    return undecoded(Dataset.from_list(plain, features=ROW_FEATURES))


def mined(rows: Dataset, model: Any, collator: LinkingCollator, count: int = 4) -> dict[str, list[str]]:
    found = HardNegatives(rows)
    found.mine(model, collator, count, progress=False)
    return found.state()


def in_full(rows: Dataset, model: Any, collator: LinkingCollator) -> dict[str, list[tuple[float, str]]]:
    """All that may be a mention's negative with its score, best first: every pair scored at once."""
    batch = collator(list(rows))
    with torch.no_grad():
        scores = model.score(model.encode_mentions(**batch.mentions), model.encode_entities(**batch.entities)).total
    return {
        row["id"]: sorted(
            (
                (-score, qid)
                for score, qid in zip(line.tolist(), batch.qids, strict=True)
                if qid not in row["candidate_qids"] and score > float("-inf")
            ),
        )
        for row, line in zip(rows, scores, strict=True)
    }


@pytest.mark.parametrize("blocks", [(256, 512), (7, 5)])
def test_the_best_scoring_wrong_entities_are_found(blocks, rows, model, processor, monkeypatch):
    monkeypatch.setattr(negatives, "MENTION_BLOCK", blocks[0])
    monkeypatch.setattr(negatives, "ENTITY_BLOCK", blocks[1])
    collator = LinkingCollator(processor)
    expected, found = in_full(rows, model, collator), mined(rows, model, collator)
    assert found.keys() == expected.keys()
    for row_id, qids in found.items():
        scores = {qid: -score for score, qid in expected[row_id]}
        best = [-score for score, _ in expected[row_id][:4]]
        assert [scores[qid] for qid in qids] == pytest.approx(best, abs=1e-4)
        assert len(set(qids)) == 4


def test_neither_the_gold_nor_a_candidate_is_found_however_many_are_asked_for(rows, processor):
    found = mined(rows, tiny_model(processor), LinkingCollator(processor), count=10**6)
    every = {qid for row in rows for qid in row["candidate_qids"]}
    for row in rows:
        assert row["answer_qid"] in row["candidate_qids"]
        assert set(found[row["id"]]) == every - set(row["candidate_qids"])
        assert len(found[row["id"]]) == len(set(found[row["id"]]))


def planted(data, number: int) -> list[dict[str, Any]]:
    """Rows in a ring: the next row has an entity that reads and looks as this row's mention does."""
    plain = [dict(row) for row in undecoded(data["train"].select(range(number)))]
    for place, row in enumerate(plain):
        row["mention"], row["context"] = f"name {place}", f"seen {place}"
    for place, row in enumerate(plain):
        before = plain[place - 1]
        row["answer_qid"], row["answer"] = f"gold{place}", 0
        row["candidate_qids"] = [f"gold{place}", f"like{(place - 1) % number}"]
        row["candidate_names"] = ["someone", before["mention"]]
        row["candidate_descriptions"] = ["else", before["context"]]
        row["candidate_images"] = [row["candidate_images"][0], before["mention_image"]]
    return plain


def test_what_looks_like_a_mention_is_its_hardest_negative(data, processor):
    rows = undecoded(Dataset.from_list(planted(data, 10), features=ROW_FEATURES))
    for seed in range(3):
        found = mined(rows, tiny_model(processor, seed=seed), LinkingCollator(processor), count=1)
        assert found == {row["id"]: [f"like{place}"] for place, row in enumerate(rows)}


@pytest.mark.parametrize("gold_is_candidate", [True, False])
def test_a_gold_that_looks_like_the_mention_is_none(gold_is_candidate, data, processor):
    plain = planted(data, 10)
    for place, row in enumerate(plain):  # the same entity is another row's candidate, and this mention's gold
        row["answer_qid"] = f"like{place}"
        row["candidate_qids"][0] = f"like{place}" if gold_is_candidate else f"gold{place}"
    rows = undecoded(Dataset.from_list(plain, features=ROW_FEATURES))
    found = mined(rows, tiny_model(processor), LinkingCollator(processor))
    assert all(f"like{place}" not in found[row["id"]] for place, row in enumerate(plain))


def test_an_entity_is_what_all_rows_say_of_it(rows, processor):
    found = HardNegatives(rows)
    found.mine(tiny_model(processor), LinkingCollator(processor), 5, progress=False)
    known: dict[str, Any] = {}
    for one in (one for row in rows for one in candidates_of(row)):
        known[one.qid] = known.get(one.qid, one).filled(one)
    assert {row_id: [known[qid] for qid in qids] for row_id, qids in found.state().items()} == dict(found)
    described = {one.qid: one for row in reversed(list(rows)) for one in candidates_of(row)}
    assert any(one != described[one.qid] for entities in found.values() for one in entities)


def test_entities_that_show_nothing_are_left_out(data, processor):
    plain = planted(data, 6)
    plain[3] |= {"candidate_names": ["someone", ""], "candidate_images": [None, None]}
    plain[3]["candidate_descriptions"] = ["else", None]
    rows = undecoded(Dataset.from_list(plain, features=ROW_FEATURES))
    found = mined(rows, tiny_model(processor), LinkingCollator(processor), count=100)
    assert all("like2" not in qids and len(qids) >= 9 for qids in found.values())


def test_looking_changes_neither_weights_nor_mode_nor_random_state(rows, model, processor):
    expected = mined(rows, model, LinkingCollator(processor))
    model.train()
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):  # CLIP's attention
            part.dropout = 0.5
    before, state = {name: one.clone() for name, one in model.state_dict().items()}, torch.get_rng_state()
    one, other = (mined(rows, model, LinkingCollator(processor)) for _ in range(2))
    assert one == other == expected
    assert model.training and all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_its_state_is_json_and_pictures_stay_on_disk(data, processor, tmp_path):
    data["train"].save_to_disk(tmp_path)
    rows = undecoded(Dataset.load_from_disk(tmp_path))
    found = HardNegatives(rows)
    found.mine(tiny_model(processor), LinkingCollator(processor), 2, progress=False)
    again = HardNegatives(rows)
    again.restore(json.loads(json.dumps(found.state())))
    assert dict(again) == dict(found) and len(again) == len(rows)
    pickled = pickle.dumps(found)
    pictures = sum(len(image["bytes"]) for row in rows for image in row["candidate_images"])
    assert len(pickled) < pictures / 4
    assert dict(pickle.loads(pickled)) == dict(found)


# In training


def settings(folder, **changes: Any) -> TrainingArguments:
    few = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "warmup_steps": 1,
        "eval_steps": 99,
        "save_steps": 1,
    }
    mining = {"mine_negatives": 2, "negatives_per_mention": 2, "learning_rate": 5e-3, "save_total_limit": 99}
    return TrainingArguments(output_dir=folder, **(few | mining | {"token_dropout": 0.1} | changes))


@pytest.fixture
def looked(monkeypatch) -> Iterator[list[int]]:
    """At which steps a run looked for negatives."""
    steps: list[int] = []
    whole = _Run._begin_epoch

    def begin(self, epoch):
        before = self.feed.negatives.state()
        whole(self, epoch)
        if self.feed.negatives.state() is not before:
            steps.append(self.clock.step)

    monkeypatch.setattr(_Run, "_begin_epoch", begin)
    return steps


def test_negatives_are_looked_for_every_so_many_epochs_and_reach_the_batches(
    looked, data, processor, tmp_path, monkeypatch
):
    batches = []
    whole = TrainingCollator.__call__
    monkeypatch.setattr(
        TrainingCollator, "__call__", lambda self, rows: batches.append(whole(self, rows)) or batches[-1]
    )
    rows = data["train"].select(range(12))
    own = {row["id"]: len(row["candidate_qids"]) for row in rows}
    train(tiny_model(processor), processor, rows, None, settings(tmp_path, num_train_epochs=5), progress=False)
    assert looked == [0, 6, 12]
    assert all(batch.candidates == sum(own[name] for name in batch.names) + 2 * 4 for batch in batches)
    states = [json.loads((tmp_path / f"checkpoint-{step}/state.json").read_text())["negatives"] for step in (1, 6, 7)]
    assert states[0] == states[1] != states[2]


def test_without_asking_none_are_looked_for(looked, data, processor, tmp_path):
    rows = data["train"].select(range(8))
    train(tiny_model(processor), processor, rows, None, settings(tmp_path, mine_negatives=None), progress=False)
    assert looked == []


@pytest.mark.parametrize("killed_at", [2, 3, 5, 6, 8])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(killed_at, data, processor, tmp_path, monkeypatch):
    rows = data["train"].select(range(12))

    def run(folder, **changes):
        model, result = train(tiny_model(processor), processor, rows, None, settings(folder, **changes), progress=False)
        assert result.steps == 9
        return model.state_dict()

    through = run(tmp_path / "through")
    whole = _Run._after_step

    def killed(self):
        whole(self)
        if self.clock.step == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Run, "_after_step", killed)
        run(tmp_path / "killed")
    resumed = run(tmp_path / "killed", resume=True, dataloader_num_workers=2 if killed_at == 5 else 0)
    assert all(torch.equal(resumed[name], one) for name, one in through.items())


def test_two_processes_find_what_one_finds(rows, processor, tmp_path, monkeypatch):
    rows.save_to_disk(tmp_path / "rows")
    processor.save_pretrained(tmp_path / "processor")
    script = tmp_path / "two.py"
    script.write_text(
        """
import json
import sys
from pathlib import Path

from accelerate import Accelerator
from datasets import Dataset
from m3el_hf import ClipNDModel, ClipNDProcessor
from m3el_hf.data.collator import LinkingCollator
from m3el_hf.training import negatives

folder, accelerator = Path(sys.argv[1]), Accelerator()
negatives.ENTITY_BLOCK = 6
collator = LinkingCollator(ClipNDProcessor.from_pretrained(folder / "processor"))
found = {}
for head in ("clip", "matching"):
    mined = negatives.HardNegatives(Dataset.load_from_disk(folder / "rows"))
    read, shares = mined._read, []
    mined._read = lambda qids: shares.append(len(qids)) or read(qids)
    mined.mine(ClipNDModel.from_pretrained(folder / head), collator, 4, progress=False)
    found[head] = mined.state()
answer = {"processes": accelerator.num_processes, "encoded": sum(shares), "found": found}
(folder / f"{accelerator.process_index}.json").write_text(json.dumps(answer))
accelerator.end_training()
"""
    )
    monkeypatch.setattr(negatives, "ENTITY_BLOCK", 6)
    alone = {}
    for head in ("clip", "matching"):
        model = tiny_model(processor, head)
        model.save_pretrained(tmp_path / head)
        alone[head] = mined(rows, model, LinkingCollator(processor))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert one["processes"] == other["processes"] == 2
    assert one["found"] == other["found"] == alone
    entities = len({qid for row in rows for qid in row["candidate_qids"]})
    assert one["encoded"] + other["encoded"] == entities  # each encoded its half alone
    assert abs(one["encoded"] - other["encoded"]) <= 6
