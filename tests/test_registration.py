from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoProcessor

import m3el_hf
from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
from tests.conftest import tiny_model

# Each is what a program may do first, in an interpreter of its own; then the three Auto classes must know the model.
FIRST = {
    "before": "import m3el_hf",
    "after one of them": "from transformers import AutoModel; import m3el_hf",
    "after the pipeline": "from transformers import pipeline; import m3el_hf",
    "our model first": "from m3el_hf import ClipNDModel",
    "its module itself": "import m3el_hf; from transformers.models.auto.modeling_auto import AutoModel",
}

# One process that has imported what transformers imports, which is most of the time, and for each case a copy of it.
PROGRAM = """
import json, os, sys
import accelerate, huggingface_hub, tokenizers, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
folder, cases = sys.argv[1], json.loads(sys.argv[2])
assert not [name for name in sys.modules if name.startswith(("transformers", "m3el_hf"))]
children = {}
for name, statements in cases.items():
    child = os.fork()
    if child == 0:
        exec(statements)
        from transformers import AutoConfig, AutoModel, AutoProcessor
        classes = [type(auto.from_pretrained(folder)) for auto in (AutoConfig, AutoModel, AutoProcessor)]
        line = json.dumps([name, [f"{one.__module__}.{one.__name__}" for one in classes]])
        os.write(1, f"{line}\\n".encode())  # at once: its siblings write too
        os._exit(0)
    children[child] = name
for child in children:
    os.waitpid(child, 0)
"""


def run(program: str, *arguments: str, home: Path) -> str:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
def test_in_any_order_of_imports_the_auto_classes_need_no_remote_code(processor, tmp_path):
    model, folder = tiny_model(processor), tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    lines = run(PROGRAM, str(folder), json.dumps(FIRST), home=tmp_path).splitlines()
    expected = [f"{one.__module__}.{one.__name__}" for one in (ClipNDConfig, ClipNDModel, ClipNDProcessor)]
    assert dict(map(json.loads, lines)) == dict.fromkeys(FIRST, expected)


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    program = "import json, sys, m3el_hf; print(json.dumps([m3el_hf.__version__, sorted(sys.modules)]))"
    version, modules = json.loads(run(program, home=tmp_path))
    assert version == m3el_hf.__version__
    heavy = {"torch", "datasets", "evaluate", "matplotlib", "peft", "accelerate", "pandas", "PIL"}
    assert not heavy & set(modules)


def test_here_too_the_auto_classes_make_ours(processor):
    config = AutoConfig.for_model("clipnd", head="matching")
    assert type(config) is ClipNDConfig and config.head == "matching"
    tiny = tiny_model(processor).config
    assert type(AutoModel.from_config(tiny)) is ClipNDModel
    with pytest.raises(OSError, match="from_pretrained"):
        AutoProcessor()


def test_every_public_name_is_there_and_sorted():
    assert m3el_hf.__all__ == sorted(m3el_hf.__all__) == dir(m3el_hf)
    for name in m3el_hf.__all__:
        assert getattr(m3el_hf, name) is not None
    with pytest.raises(AttributeError, match="'m3el_hf' has no attribute 'ClipNDMdel'"):
        _ = m3el_hf.ClipNDMdel
