from __future__ import annotations

import json
import subprocess
import sys

import pytest

from m3el_hf import ClipNDProcessor
from m3el_hf.cli import main
from m3el_hf.evaluation.outcomes import Evaluation
from m3el_hf.sources import load_model
from tests.conftest import instance, tiny_model, write_release


@pytest.fixture
def saved(processor, tmp_path):
    folder = tmp_path / "best"
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_help_needs_no_heavy_import():
    code = "import sys, m3el_hf.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'datasets'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_help_shows_only_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        main(["quickstart", "--help"])
    printed = capsys.readouterr().out
    assert "(default: 4.0)" in printed
    assert "(default: 0)" in printed  # the seed
    assert "None" not in printed
    assert "False" not in printed


def test_build_reports_what_it_left_out(tmp_path, capsys):
    instances = [instance(n) for n in range(4)]
    instances[1]["Qid"] = "Q999"
    del instances[2]["Qid"]
    release = write_release(tmp_path / "raw", instances)
    (release / "person_candidates_images" / "Name 0-Q00" / "Q01.png").write_bytes(b"<html>not found</html>")
    assert main(["data", "build", "--input", str(release), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "4 instances read, 2 written" in printed
    assert "person.json row 1: its gold Q999 is not among its candidates" in printed
    assert "person.json row 2: has no gold" in printed
    assert "Q01.png is not a picture" in printed


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["data", "build", "--input", "nowhere", "--output", "{tmp}/out"], "no such folder: nowhere"),
        (["data", "build", "--output", "{tmp}/out"], "pass the folder"),
        (
            ["data", "build", "--reader", "csv", "--output", "{tmp}/out"],
            "unknown reader 'csv': choose one of m3el, mimic, ",
        ),
        (["data", "build", "--input", "{tmp}", "--output", "{store}/../out"], "holds no M3EL file"),
        (["data", "build", "--reader", "mini", "--input", "{tmp}", "--output", "{store}/../out"], "mini is generated"),
        (["data", "build", "--input", "{tmp}", "--output", "{tmp}/out"], "lies in the source"),
        (["data", "build", "--reader", "mini", "--instances", "0", "--output", "{tmp}/out"], "instances"),
        (["data", "build", "--input", "{tmp}", "--instances", "5", "--output", "{tmp}/out"], "--instances is for"),
        (["data", "build", "--reader", "mini", "--output", "{tmp}"], "is never replaced"),
        (["data", "build", "--reader", "mini", "--output", "{store}"], "exists already"),
        (["data", "build", "--reader", "mini", "--license", "My own", "--output", "{tmp}/out"], "is no licence"),
        (["quickstart", "--data-dir", "nowhere", "--output", "{tmp}/q"], "no such folder"),
        (["quickstart", "--minutes", "0.01", "--data-dir", "{store}", "--output", "{tmp}/q"], "allow at least"),
        (["quickstart", "--base", "{tmp}", "--data-dir", "{store}", "--output", "{tmp}/q"], "cannot start from"),
        (["train", "--data", "{store}", "--learning-rate", "-1"], "learning_rate is -1.0"),
        (["train", "--data", "{tmp}/nothing"], "no such folder"),
        (["train", "--data", "{tmp}"], "is no dataset that m3el-hf data build wrote"),
        (["train", "--data", "m3el"], "no such folder: m3el"),
        (["train", "--data", "{store}", "--base", "/nope"], "no such folder: /nope"),
        (["quickstart", "--minutes", "0", "--output", "{tmp}/q"], "allow at least 1"),
        (["link", "--model", "/nope", "--knowledge-base", "{store}", "--name", "x"], "no such folder: /nope"),
        (["evaluate", "{model}", "--data", "{store}", "--split", "dev"], "no split 'dev'"),
        (["evaluate", "{tmp}/nothing", "--data", "{store}"], "no such folder"),
        (["evaluate", "{model}", "--data", "{store}", "--tasks", "t2x"], "unknown task 't2x'"),
        (["evaluate", "{model}", "--data", "{store}", "--against", "knowledge-base", "--nil", "entity"], "--nil-score"),
        (["experiment", "ablation"], "no experiment 'ablation': choose one of ablation-heads"),
        (["experiment", "scale", "--data", "{tmp}/nothing"], "no such folder"),
        (["link", "--model", "{model}", "--knowledge-base", "{store}"], "nothing to link"),
        (["link", "--model", "{model}", "--knowledge-base", "{store}", "--image", "{store}/README.md"], "README.md"),
        (["push", "{tmp}", "user/x"], "no config.json"),
        (["push", "{tmp}", "--private", "user/x"], "no config.json"),
        (["push", "{tmp}", "--metric", "user/linking_accuracy"], "either a folder or the metric"),
        (["push", "--metric", "user/x"], "name the repository user/linking_accuracy"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(command, says, tmp_path, store, saved, capsys):
    places = {"tmp": tmp_path, "store": store, "model": saved}
    assert main([word.format(**places) for word in command]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("m3el-hf: ")
    assert says in line


@pytest.mark.parametrize("kind", [[], ["--lora", "--head", "matching"]])
def test_train_evaluate_and_link_follow_each_other(kind, store, tmp_path, capsys):
    flags = [
        *kind,
        "--num-train-epochs",
        "1",
        "--eval-steps",
        "1",
        "--learning-rate",
        "1e-3",
        "--output-dir",
        str(tmp_path),
    ]
    assert main(["train", "--data", str(store), *flags]) == 0
    model = str(tmp_path / "best")
    assert main(["evaluate", model, "--data", str(store), "--output", str(tmp_path / "report")]) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    names = [column["name"] for column in results["tables"][0]["columns"]]
    assert {"chance", "BM25", "image hash", f"{tmp_path.name}/best", "mention-blind control"} < set(names)
    again = Evaluation.load(tmp_path / "report")
    assert (again.protocol, len(again)) == ("candidate set of 3", results["tables"][0]["rows"][0]["cells"]["n"])
    base = ["--against", "knowledge-base", "--tasks", "t2t", "it2it", "--cache-dir", str(tmp_path / "kept")]
    assert main(["evaluate", model, "--data", str(store), "--output", str(tmp_path / "base"), *base]) == 0
    assert "full knowledge base of" in Evaluation.load(tmp_path / "base").protocol
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    assert (
        main(["link", "--model", model, "--knowledge-base", str(store), "--context", "a red star", "--top-k", "3"]) == 0
    )
    links = capsys.readouterr().out.splitlines()[-3:]
    scores = [float(line.split()[0]) for line in links]
    assert scores == sorted(scores, reverse=True)
    # A run that was killed leaves this behind.
    assert main(["link", "--model", str(tmp_path / "best"), "--knowledge-base", str(store), "--name", "x"]) == 0


def test_a_model_is_evaluated_and_linked_with_the_template_that_it_was_trained_with(store, tmp_path, capsys):
    flags = ["--num-train-epochs", "1", "--eval-steps", "1e9", "--learning-rate", "1e-3", "--output-dir", str(tmp_path)]
    assert main(["train", "--data", str(store), "--template", "D", *flags]) == 0
    assert ClipNDProcessor.from_pretrained(tmp_path / "best").template == "D"
    assert load_model(tmp_path / "best")[1].template == "D"  # as evaluate and link load it


def test_nil_is_refused_where_nothing_would_come_of_it(store, tmp_path, capsys):
    for flags in (["--nil", "miss"], ["--nil-score", "0.5"]):
        assert main(["evaluate", "x", "--data", str(store), "--output", str(tmp_path / "out"), *flags]) == 2
        assert "nil and nil_score are for a knowledge base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("m3el_hf.data.store.build", interrupt)
    assert main(["data", "build", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "m3el-hf: interrupted\n"
