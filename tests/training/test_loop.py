from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from m3el_hf import ClipNDModel, M3ELError
from m3el_hf.cli import main
from m3el_hf.data.collator import LinkingCollator, undecoded
from m3el_hf.evaluation.evaluator import evaluate
from m3el_hf.evaluation.systems import ModelSystem
from m3el_hf.training import log, loop
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import TrainingCollator
from m3el_hf.training.checkpoints import newest_checkpoint
from m3el_hf.training.log import read_log
from m3el_hf.training.loop import train
from m3el_hf.training.objective import Objective
from tests.conftest import tiny_model
from tests.training.jobs import job, launch, run_job


def arguments(folder: Path, **changes) -> TrainingArguments:
    few = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "eval_steps": 0.5, "warmup_steps": 1}
    return TrainingArguments(output_dir=folder, **({"learning_rate": 2e-3, "token_dropout": 0.1} | few | changes))


def test_training_learns_its_own_rows(processor, data: DatasetDict, tmp_path):
    rows = data["train"].select(range(24))
    model = tiny_model(processor)
    before = evaluate([ModelSystem("m", model, processor)], rows).mean("m")
    settings = arguments(tmp_path, num_train_epochs=50, tasks_per_mention=9, token_dropout=0.0)
    model, result = train(model, processor, rows, rows, settings, progress=False)
    after = evaluate([ModelSystem("m", model, processor)], rows).mean("m")
    assert result.steps == 150
    assert before < 0.5 and after > before + 0.2


def test_the_model_has_the_weights_of_the_best_validation_run(processor, data, tmp_path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    values = iter([0.4, 0.9, 0.2, 0.5])

    class Fixed:
        def mean(self, *_):
            return next(values)

    def fake_evaluate(systems, rows):
        seen.append({name: one.clone() for name, one in systems[0].model.state_dict().items()})
        return Fixed()

    monkeypatch.setattr(loop, "evaluate", fake_evaluate)
    settings = arguments(tmp_path, eval_steps=0.25)
    model, result = train(
        tiny_model(processor), processor, data["train"].select(range(16)), data["validation"], settings, progress=False
    )
    assert [entry["validation_mrr"] for entry in result.history] == [0.4, 0.9, 0.2, 0.5]
    assert result.best_mrr == 0.9 and result.best_step == result.history[1]["step"]
    for weights in (model.state_dict(), ClipNDModel.from_pretrained(tmp_path / "best").state_dict()):
        assert all(torch.equal(weights[name], one) for name, one in seen[1].items())
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_seed_gives_the_same_weights(processor, data, tmp_path):
    rows, held_out = data["train"].select(range(16)), data["validation"].select(range(4))
    folders = tmp_path / "one", tmp_path / "other"
    settings = [arguments(folder, augment_pictures=True, num_train_epochs=1) for folder in folders]
    one, other = (
        train(tiny_model(processor), processor, rows, held_out, one, progress=False)[0].state_dict() for one in settings
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_not_finite_stops_the_run(processor, data, tmp_path):
    model = tiny_model(processor)
    with torch.no_grad():
        model.clip.text_projection.weight.fill_(math.nan)
    with pytest.raises(M3ELError, match=r"loss is nan at step 0.*no checkpoint"):
        train(model, processor, data["train"], data["validation"], arguments(tmp_path), progress=False)


@pytest.mark.parametrize("empty", ["training", "validation"])
def test_an_empty_split_is_named(empty, processor, data, tmp_path):
    splits = {"training": data["train"], "validation": data["validation"]}
    splits[empty] = splits[empty].select([])
    with pytest.raises(M3ELError, match=empty):
        train(tiny_model(processor), processor, *splits.values(), arguments(tmp_path), progress=False)


def test_time_ends_a_run(processor, data, tmp_path):
    settings = arguments(tmp_path, num_train_epochs=10_000, max_minutes=0.02)
    _, result = train(
        tiny_model(processor), processor, data["train"], data["validation"].select(range(4)), settings, progress=False
    )
    assert 0 < result.steps < 1000
    assert len(result.history) >= 1


def test_a_batch_hides_what_its_tasks_do_not_show(processor, data, tmp_path):
    rows = list(undecoded(data["train"].select(range(12))))
    batch, later = (TrainingCollator(LinkingCollator(processor), arguments(tmp_path), epoch)(rows) for epoch in (0, 1))
    for kind, column in (("has_text", 0), ("has_image", 1)):
        shown = {int(row) for row, view in zip(batch.rows, batch.views, strict=True) if view[column]}
        assert set(batch.mentions[kind].nonzero().flatten().tolist()) == shown
    assert not torch.equal(later.views, batch.views)


def test_a_loss_that_is_not_finite_later_keeps_the_last_checkpoint(store, tmp_path, monkeypatch):
    whole = Objective.forward
    calls = []

    def spoiled(self, *given):
        calls.append(given)
        result = whole(self, *given)
        return result | {"backward": result["backward"] * math.nan} if len(calls) == 4 else result

    monkeypatch.setattr(Objective, "forward", spoiled)
    with pytest.raises(M3ELError, match=r"gradient is nan at step 3, with the rows mini-.*checkpoint-2$") as error:
        run_job(job(store, tmp_path, save_steps=2))
    assert "\n" not in str(error.value)
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(one.isfinite().all() for one in weights.values())


def test_a_full_disk_keeps_the_last_checkpoint(store, tmp_path, monkeypatch):
    save = torch.save

    def full(what, path, *rest, **options):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(what, path, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        M3ELError, match=r"cannot write .*checkpoint-4.*No space left.*--resume.*checkpoint-2$"
    ) as error:
        run_job(job(store, tmp_path, save_steps=2))
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}
    monkeypatch.undo()
    assert run_job(job(store, tmp_path, save_steps=2, resume=True))[1].steps == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_really_full(store, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(M3ELError, match=r"cannot write .*(No space left|failed writing|unexpected pos)"):
            run_job(job(store, disk, save_steps=1, save_total_limit=10, max_steps=20, eval_steps=100))
        assert newest_checkpoint(disk) is not None and not list(disk.glob("*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_worker_that_is_killed_is_one_line(store, tmp_path, monkeypatch):
    prepare = TrainingCollator.__call__

    def killed(self, rows):
        if get_worker_info() is not None and self._epoch == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(self, rows)

    monkeypatch.setattr(TrainingCollator, "__call__", killed)
    with pytest.raises(M3ELError, match=r"DataLoader worker .*--dataloader-num-workers.*checkpoint-[2468]$") as error:
        run_job(job(store, tmp_path, rows=16, save_steps=2, dataloader_num_workers=1, max_steps=12))
    assert "\n" not in str(error.value)


def test_an_error_in_a_worker_is_its_line_alone(store, tmp_path, monkeypatch):
    def wrong(self, rows):
        raise M3ELError("the rows are wrong: mend them")

    monkeypatch.setattr(TrainingCollator, "__call__", wrong)
    with pytest.raises(M3ELError, match="^the rows are wrong: mend them$"):
        run_job(job(store, tmp_path, dataloader_num_workers=1))


def test_a_loaded_model_is_trained_in_training_mode(processor, data, tmp_path, monkeypatch):
    tiny_model(processor).save_pretrained(tmp_path / "start")
    model, modes, forward = ClipNDModel.from_pretrained(tmp_path / "start"), [], Objective.forward

    def noted(self, *inputs):
        modes.append(all(module.training for module in self.model.modules()))
        return forward(self, *inputs)

    monkeypatch.setattr(Objective, "forward", noted)
    rows = data["train"].select(range(16))
    train(model, processor, rows, data["validation"], arguments(tmp_path, num_train_epochs=1), progress=False)
    assert modes and all(modes)


def test_a_column_that_is_missing_is_named(processor, data, tmp_path):
    rows = data["train"].remove_columns("candidate_images")
    with pytest.raises(M3ELError, match="no candidate_images"):
        train(tiny_model(processor), processor, rows, None, arguments(tmp_path), progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_writes_a_checkpoint_and_ends(workers, store, tmp_path, monkeypatch, capsys):
    take, calls = loop.backward, []

    def told(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*given)

    monkeypatch.setattr(loop, "backward", told)
    flags = ["--max-steps", "6", "--eval-steps", "6", "--save-steps", "100", "--output-dir", str(tmp_path)]
    flags += ["--per-device-train-batch-size", "8", "--dataloader-num-workers", str(workers)]
    command = ["train", "--data", str(store), *flags]
    assert main(command) == 143
    said = capsys.readouterr().err
    assert "told to stop after step 3: go on with" in said and "--resume" in said
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "log.jsonl", "recipe.yaml"}
    assert main([*command, "--resume"]) == 0
    assert len(calls) == 6
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("m3el-hf: ") and "is of an earlier run: continue that with --resume" in said


def test_without_validation_rows_the_last_weights_are_the_best(processor, data, tmp_path):
    settings = arguments(tmp_path, resume=True)  # with nothing to resume, it starts
    model, result = train(
        tiny_model(processor), processor, data["train"].select(range(16)), None, settings, progress=False
    )
    assert result.best_step == result.steps == 4 and result.best_mrr == -1 and not result.history
    for name in ("best", "last"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(saved[key], one) for key, one in model.state_dict().items())


@pytest.mark.parametrize("validates", [True, False])
def test_the_plot_has_the_last_losses(validates, processor, data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(log, "plot_log", lambda entries, path: drawn.append(entries))
    held_out = data["validation"].select(range(4)) if validates else None
    settings = arguments(tmp_path, max_steps=3, logging_steps=2, eval_steps=1)
    train(tiny_model(processor), processor, data["train"].select(range(16)), held_out, settings, progress=False)
    assert drawn[-1] == read_log(tmp_path)
    assert [line["step"] for line in drawn[-1] if "loss" in line] == [2, 3]


def test_hard_negatives_with_divided_weights_are_refused(processor, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "is_sharded", lambda accelerator: True)
    with pytest.raises(M3ELError, match="FSDP.*leave mine_negatives out"):
        train(tiny_model(processor), processor, data["train"], None, arguments(tmp_path, mine_negatives=1))


def test_it_stops_early_and_in_the_middle_of_an_epoch(store, tmp_path, monkeypatch):
    values = iter([0.5, 0.6, 0.4, 0.6, 0.9])
    monkeypatch.setattr(loop._Run, "_measure", lambda self: next(values))
    _, result = run_job(job(store, tmp_path / "early", max_steps=20, eval_steps=2, early_stopping_patience=2))
    assert [entry["step"] for entry in result.history] == [2, 4, 6, 8]
    assert (result.steps, result.best_step, result.best_mrr) == (8, 4, 0.6)
    values = iter([0.5, 0.6])
    _, result = run_job(job(store, tmp_path / "middle", max_steps=6, eval_steps=4, logging_steps=4, save_total_limit=1))
    assert [line["step"] for line in read_log(tmp_path / "middle")] == [4, 4, 6, 6]
    assert [path.name for path in (tmp_path / "middle").glob("checkpoint-*")] == ["checkpoint-6"]


def test_what_is_logged_is_what_it_says(store, tmp_path, monkeypatch):
    """Each term is its mean over the steps that had it; the loss is their weighted sum."""
    take, seen = loop.backward, []

    def noted(*given):
        terms = take(*given)
        seen.append({name: value.item() for name, value in terms.items()})
        return terms

    monkeypatch.setattr(loop, "backward", noted)
    settings = {"head": "matching", "tasks": "t2t=1,i2i=1", "tasks_per_mention": 1, "per_device_train_batch_size": 2}
    run_job(job(store, tmp_path, max_steps=12, logging_steps=4, eval_steps=12, **settings))
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert len(lines) == 3
    assert any(len([one for one in seen[i : i + 4] if "loss/text" in one]) < 4 for i in (0, 4, 8))
    for line, steps in zip(lines, (seen[:4], seen[4:8], seen[8:]), strict=True):
        names = {name for one in steps for name in one}
        assert names == {name for name in line if name.startswith("loss")}
        for name in names:
            values = [one[name] for one in steps if name in one]
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    for one in seen:
        contrastive = [one[name] for name in one if "contrastive" in name]
        branches = sum(one.get(f"loss/{name}", 0) for name in ("total", "text", "image", "cross"))
        whole = branches + 0.5 * one["loss/entity_to_mention"]
        assert one["loss"] == pytest.approx(whole + sum(contrastive) / max(1, len(contrastive)), rel=1e-5)


def test_compiled_towers_keep_the_names_of_their_weights(store, tmp_path, monkeypatch):
    """With the backend that needs no compiler."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
    model, _ = run_job(job(store, tmp_path, torch_compile=True, max_steps=2))
    assert load_file(tmp_path / "best" / "model.safetensors").keys() == model.state_dict().keys()
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


def test_bf16_scores_in_fp32_and_fp16_is_refused_without_an_accelerator(store, tmp_path):
    jobs = [job(store, tmp_path / name, head="matching", mixed_precision="bf16") for name in ("whole", "parts")]
    jobs[1]["settings"] |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch([str(Path(__file__).with_name("halved.py")), str(tmp_path / "jobs.json")], 1)
    assert "fp16 cannot be had" in done.stdout
    losses = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and all(math.isfinite(one) for one in losses[0])
    weights = load_file(tmp_path / "whole" / "last" / "model.safetensors")
    assert {one.dtype for one in weights.values()} == {torch.float32}
