from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from datasets import concatenate_datasets
from transformers import AutoModel

from m3el_hf import training_run
from m3el_hf.cli import main
from m3el_hf.sources import load_built
from m3el_hf.training.loop import TrainingResult
from tests.conftest import tiny_model
from tests.hub_server import hub_environment, run_python

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Lets a test choose its precision, of which accelerate has one a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def words(store: Path, folder: Path, *more: str) -> list[str]:
    few = ["--max-steps", "2", "--per-device-train-batch-size", "8", "--eval-steps", "1", "--warmup-steps", "0"]
    return ["train", "--data", str(store), "--output-dir", str(folder), *few, *more]


def figures(card: str) -> dict[str, float]:
    (entry,) = yaml.safe_load(card.split("---")[1])["model-index"]
    return {one["dataset"]["config"]: one["metrics"][0]["value"] for one in entry["results"]}


def test_a_run_says_what_it_does_and_leaves_what_it_says(store, tmp_path, capsys):
    assert main(words(store, tmp_path)) == 0
    plan, time, best, models, log = capsys.readouterr().out.splitlines()
    assert "parameters are trained; 8 mentions" in plan
    assert " for 2 steps (" in time
    assert best.startswith("best of 2 steps: ")
    assert str(tmp_path / "best") in models and str(tmp_path / "log.jsonl") in log
    for name in ("best", "last", "log.jsonl", "training.png", "recipe.yaml", "checkpoint-2"):
        assert (tmp_path / name).exists()
    card = (tmp_path / "best" / "README.md").read_text()
    assert len(figures(card)) == 9
    names = ["chance", "string match", "character match", "BM25", "image hash", "model", "mention-blind control"]
    assert f"| task | {' | '.join(names)} | n |" in card.replace(" (%)", "")
    assert "On validation, which chose these weights, the mean is" in card
    assert str(tmp_path) not in card
    again = ["train", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert figures((tmp_path / "again" / "best" / "README.md").read_text()) == figures(card)


def test_without_a_test_split_the_card_says_that_validation_flatters(store, tmp_path, monkeypatch):
    def without_test(source):
        data = load_built(source)
        data["validation"] = concatenate_datasets([data["validation"], data.pop("test")])
        return data

    monkeypatch.setattr(training_run, "load_built", without_test)
    assert main(words(store, tmp_path)) == 0
    card = (tmp_path / "best" / "README.md").read_text()
    assert "validation chose these weights, and its figures flatter them" in card
    assert "split: validation" in card


def test_a_saved_model_is_trained_on_and_named(store, processor, tmp_path, capsys):
    for part in (tiny_model(processor, "matching"), processor):
        part.save_pretrained(tmp_path / "mine")
    assert main(words(store, tmp_path / "run", "--base", str(tmp_path / "mine"), "--branch-weight", "0.5")) == 0
    config = AutoModel.from_pretrained(tmp_path / "run" / "best").config
    assert (config.head, config.branch_weight) == ("matching", 0.5)
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert "started from mine." in card and "base_model" not in card  # which the Hub would look up
    assert "| BM25 | image hash | before training | model |" in card.replace(" (%)", "")
    capsys.readouterr()
    assert main(words(store, tmp_path / "other", "--base", str(tmp_path / "mine"), "--head", "clip")) == 2
    assert "has the head matching, not clip: leave head out" in capsys.readouterr().err


def test_a_run_that_is_told_to_stop_says_how_it_goes_on(store, tmp_path, monkeypatch, capsys):
    stopped = TrainingResult(steps=7, is_finished=False)
    monkeypatch.setattr(training_run, "train", lambda model, *_, **__: (model, stopped))
    assert main(words(store, tmp_path)) == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"m3el-hf: told to stop after step 7: go on with m3el-hf train {tmp_path / 'recipe.yaml'} --resume"


@pytest.mark.parametrize(("name", "says"), [("x", "pass user/x"), ("a/b/c", "is no name"), ("user/x", "no token")])
def test_a_push_that_cannot_be_is_refused_before_training(name, says, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("m3el_hf.hub.push.get_token", lambda: None)
    assert main(words(store, tmp_path / "run", "--push-to-hub", name)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_best_model_is_published_as_often_as_asked(store, hub, tmp_path):
    epochs = ["--max-steps", "none", "--num-train-epochs", "2", "--per-device-train-batch-size", "128"]
    code = """
        import contextlib, io
        from m3el_hf.cli import main

        said = io.StringIO()
        assert main({good}) == 0
        with contextlib.redirect_stderr(said):
            assert main({refused}) == 2
        lines = [line[line.index("m3el-hf: "):] for line in said.getvalue().splitlines() if "m3el-hf: " in line]
        print("\\n".join(lines))
    """
    often = [*epochs, "--hub-every-epochs", "1", "--push-to-hub"]
    commands = {
        "good": words(store, tmp_path / "good", *often, "user/mine", "--private"),
        "refused": words(store, tmp_path / "refused", *often, "stranger/mine"),
    }
    done = run_python(code.format(**commands), hub_environment(hub.url, tmp_path / "home") | {"OMP_NUM_THREADS": "1"})
    repository = hub.repository("user/mine")
    assert repository.private
    commits = [commit.title for commit in repository.resolve("main").history()]
    assert sum(title.startswith("Upload the model") for title in commits) == 2  # after an epoch, and at the end
    files = hub.files("user/mine")
    assert files["README.md"] == (tmp_path / "good" / "best" / "README.md").read_bytes()
    assert files["model.safetensors"] == (tmp_path / "good" / "best" / "model.safetensors").read_bytes()
    assert len(figures(files["README.md"].decode())) == 9
    assert "# mine\n" in files["README.md"].decode()

    first, last = [line for line in done.stdout.splitlines() if line.startswith("m3el-hf: ")]
    best = tmp_path / "refused" / "best"
    safe = f"the model is safe in {best}: publish it with m3el-hf push {best} stranger/mine"
    assert first == f"{last}; training goes on"
    assert last.startswith(f"m3el-hf: {best} could not be pushed to stranger/mine") and last.endswith(safe)
    assert AutoModel.from_pretrained(best).config.head == "clip"


def test_two_processes_run_and_one_speaks(store, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "m3el_hf.cli", *words(store, tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    plan, *_, models, log = done.stdout.splitlines()
    assert "16 mentions" in plan  # eight of each
    assert len(done.stdout.splitlines()) == 5
    assert json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["settings"]["processes"] == 2


def test_the_cpu_recipe_runs(store, tmp_path):
    recipe = str(RECIPES / "mini-cpu.yaml")
    assert main(["train", recipe, "--data", str(store), "--output-dir", str(tmp_path), "--max-steps", "2"]) == 0
    assert (tmp_path / "best" / "README.md").is_file()


@pytest.mark.parametrize("name", ["clipnd", "matching-network", "lora-consumer-gpu"])
def test_a_recipe_runs_with_a_tiny_clip(name, store, processor, tmp_path, fresh_accelerator):
    for part in (tiny_model(processor).clip, processor.tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path / "clip")
    flags = ["--data", str(store), "--base", str(tmp_path / "clip"), "--output-dir", str(tmp_path / "run")]
    few = ["--max-steps", "1", "--per-device-train-batch-size", "4", "--dataloader-num-workers", "0"]
    assert main(["train", str(RECIPES / f"{name}.yaml"), *flags, *few]) == 0
    assert (tmp_path / "run" / "best" / "README.md").is_file()


def test_what_is_logged_reaches_tensorboard(store, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert main(words(store, tmp_path, "--report-to", "tensorboard", "--logging-steps", "1")) == 0
    assert list(tmp_path.rglob("events.out.tfevents.*"))
