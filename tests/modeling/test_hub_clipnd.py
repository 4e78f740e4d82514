from __future__ import annotations

import ast
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.testing_utils import CaptureLogger

from m3el_hf import ClipNDModel, ClipNDProcessor
from tests.modeling.conftest import HEADS, LABELS, TASK_ROWS, encode_all, forward_inputs, headed, scores_of


def save_all(processor: ClipNDProcessor, folder: Path) -> dict[str, ClipNDModel]:
    models = {head: headed(processor, head) for head in HEADS}
    for head, model in models.items():
        model.save_pretrained(folder / head)
        processor.save_pretrained(folder / head)
    return models


REMOTE = """
import json, sys
sys.modules["m3el_hf"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
torch.set_num_threads(1)
picture, *folders = sys.argv[1:]
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for one in (model, config, model.config, processor):
        assert type(one).__module__.startswith("transformers_modules."), type(one)
    assert config.head == model.config.head and config.matching_direction == model.config.matching_direction
    for one in (model, processor):
        one.save_pretrained(folder + "-again")
    inputs = [["Kansas", None], ["a band", None], [None, picture]]
    with torch.inference_mode():
        mentions = model.encode_mentions(**processor.mentions(*inputs))
        scores = model.score(mentions, model.encode_entities(**processor.entities(*inputs))).total
    print(json.dumps([processor.max_text_length, scores.tolist()]))
"""


def test_a_saved_model_scores_the_same_when_it_is_loaded(processor, picture_file, tmp_path):
    for head, model in save_all(processor, tmp_path).items():
        folder = tmp_path / head
        loaded, loaded_processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert type(loaded) is ClipNDModel and type(loaded_processor) is ClipNDProcessor
        assert not loaded.training
        for name in ("head", "matching_dim", "matching_direction"):
            assert getattr(loaded.config, name) == getattr(model.config, name)
        expected = scores_of(model, processor, picture_file)
        np.testing.assert_allclose(scores_of(loaded, loaded_processor, picture_file), expected, rtol=1e-5)


PUBLIC = {"torch", "transformers", "numpy", "PIL", "tokenizers"}


def test_what_is_saved_is_safetensors_json_and_flat_code(model, processor, tmp_path):
    """A folder of plain files: no pickle, and no Python that imports more than its neighbours and public packages."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert all(path.is_file() for path in tmp_path.iterdir())
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".py"}
    for path in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files, (path.name, node.module)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                roots = {str(name).split(".")[0] for name in names}
                assert roots <= sys.stdlib_module_names | PUBLIC, path.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_model_loads_in_any_precision_and_scores_in_fp32(model, processor, picture_file, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = ClipNDModel.from_pretrained(tmp_path, dtype=dtype)
    assert {one.dtype for one in loaded.parameters()} == {dtype}
    mentions, entities = encode_all(loaded, processor)
    scores = loaded.score(mentions, entities)
    assert mentions.text.dtype == dtype
    assert {one.dtype for one in (scores.total, *scores.branches.values())} == {torch.float32}
    expected = np.array(scores_of(model, processor, picture_file))  # of rows that lack text or picture too
    found = np.array(scores_of(loaded, processor, picture_file))
    tolerance = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=1e-5)


def test_sdpa_and_eager_attention_score_the_same(model, processor, picture_file, tmp_path):
    model.save_pretrained(tmp_path)
    expected = scores_of(model, processor, picture_file)
    for kind in ("sdpa", "eager"):
        loaded = ClipNDModel.from_pretrained(tmp_path, attn_implementation=kind)
        towers = (loaded.clip.text_model, loaded.clip.vision_model)
        assert {one.config._attn_implementation for one in towers} == {kind}
        np.testing.assert_allclose(scores_of(loaded, processor, picture_file), expected, rtol=1e-5)


def rewrite(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_what_a_newer_version_wrote_is_kept_through_load_and_save(model, tmp_path):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    rewrite(tmp_path / "config.json", something_new=[1], clip_config=written["clip_config"] | {"newer_still": {"a": 2}})
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())
    assert kept["something_new"] == [1] and kept["clip_config"]["newer_still"] == {"a": 2}
    assert written.keys() <= kept.keys()


def test_a_newer_format_says_to_upgrade(model, tmp_path):
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", format_version=2)
    for cls in (AutoModel, ClipNDModel):
        with pytest.raises(ValueError, match=r"has format 2, newer than 1, .*: upgrade m3el_hf$"):
            cls.from_pretrained(tmp_path)


# Weights that are not in the checkpoint.


@pytest.fixture
def garbage() -> Iterator[None]:
    """Memory that nobody has written to is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_initialised(model: ClipNDModel, prefixes: tuple[str, ...] = ("",)) -> None:
    for name, one in model.named_parameters():
        assert not one.is_meta and one.isfinite().all(), name
    for name, module in model.named_modules():
        if name.startswith(prefixes) and isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
        if name.startswith(prefixes) and isinstance(module, nn.Linear) and not name.startswith("clip"):
            limit = math.sqrt(6 / sum(module.weight.shape))
            assert module.weight.abs().max() <= limit and module.weight.std() > limit / 4, name
            assert not module.bias.any(), name


def test_a_head_that_the_checkpoint_lacks_starts_fresh_and_is_named(model, processor, tmp_path, garbage):
    clip = {name: one for name, one in model.state_dict().items() if name.startswith("clip.")}
    head = model.state_dict().keys() - clip.keys()
    model.save_pretrained(tmp_path, state_dict=clip)
    with CaptureLogger(transformers.utils.logging.get_logger("transformers.modeling_utils")) as captured:
        loaded, loading = ClipNDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loading["missing_keys"] == head and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert all(name in captured.out for name in head) and ("MISSING" in captured.out) == bool(head)
    assert_initialised(loaded, tuple({name.split(".")[0] for name in head}) or ("no head",))
    assert all(torch.equal(loaded.state_dict()[name], one) for name, one in clip.items())
    assert np.isfinite(loaded.score(*encode_all(loaded, processor)).total.detach().numpy()).all()


def test_every_weight_that_a_checkpoint_lacks_is_initialised(model, tmp_path, garbage):
    name = "clip.visual_projection.weight"
    model.save_pretrained(tmp_path, state_dict={name: model.state_dict()[name]})
    loaded, loading = ClipNDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loading["missing_keys"] == model.state_dict().keys() - {name}
    assert_initialised(loaded)
    assert loaded.clip.logit_scale.item() == pytest.approx(model.config.clip_config.logit_scale_init_value)


def test_a_model_made_without_memory_can_be_filled(model, processor, picture_file, garbage):
    """Made on the meta device, given memory, initialised: its buffers, which no checkpoint holds, come right too."""
    with torch.device("meta"):
        empty = ClipNDModel(model.config)
    assert all(one.is_meta for one in empty.parameters())
    empty.to_empty(device="cpu").init_weights()
    assert_initialised(empty)
    empty.load_state_dict(model.state_dict())
    np.testing.assert_allclose(
        scores_of(empty.eval(), processor, picture_file), scores_of(model, processor, picture_file), rtol=1e-6
    )


# Compiling and checkpointing.


def compile_towers(model: ClipNDModel, backend: str) -> None:
    torch._dynamo.reset()
    for tower in ("text_model", "vision_model"):
        setattr(model.clip, tower, torch.compile(getattr(model.clip, tower), backend=backend, fullgraph=True))


def test_each_tower_compiles_as_one_graph(model, processor, picture_file):
    expected = scores_of(model, processor, picture_file)
    compile_towers(model, "aot_eager")
    np.testing.assert_allclose(scores_of(model, processor, picture_file), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_towers_compile_to_machine_code(processor, picture_file):
    model = headed(processor, "bidirectional")
    expected = scores_of(model, processor, picture_file)
    compile_towers(model, "inductor")
    np.testing.assert_allclose(scores_of(model, processor, picture_file), expected, rtol=1e-4, atol=1e-5)


def test_encoding_entities_compiles(model, processor):
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model.score(*encode_all(model, processor)).total
        model.encode_entities = torch.compile(model.encode_entities, backend="eager")
        torch.testing.assert_close(model.score(*encode_all(model, processor)).total, expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_runs_each_layer_twice_and_changes_no_gradient(model, processor):
    inputs = forward_inputs(processor, TASK_ROWS) | {"labels": LABELS}
    layers = [one for name, one in model.named_modules() if type(one).__name__ == "CLIPEncoderLayer"]
    assert len(layers) == 4
    gradients, runs = [], []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        seen: list[nn.Module] = []
        hooks = [
            one.self_attn.register_forward_pre_hook(lambda part, _, seen=seen: seen.append(part)) for one in layers
        ]
        model(**inputs).loss.backward()
        for hook in hooks:
            hook.remove()
        runs.append([seen.count(one.self_attn) for one in layers])
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert runs == [[2] * 4, [4] * 4]  # mentions and entities
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_saved_model_scores_the_same_where_the_package_is_absent(processor, picture_file, tmp_path):
    models = save_all(processor, tmp_path)
    command = [sys.executable, "-c", REMOTE, str(picture_file), *(str(tmp_path / head) for head in models)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for head in models:  # what it saves again is whole: files, and what names them
        first, again = (tmp_path / name for name in (head, f"{head}-again"))
        assert {one.name for one in again.iterdir()} == {one.name for one in first.iterdir()}
        assert json.loads((again / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_clipnd.ClipNDModel"
    for model, line in zip(models.values(), done.stdout.splitlines(), strict=True):
        max_text_length, scores = json.loads(line)
        assert max_text_length == processor.max_text_length
        np.testing.assert_allclose(scores, scores_of(model, processor, picture_file), rtol=1e-5)
