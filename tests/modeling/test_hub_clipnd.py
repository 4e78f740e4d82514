from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from m3el_hf import ClipNDModel, ClipNDProcessor
from tests.modeling.conftest import HEADS, headed, scores_of


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
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
picture, *folders = sys.argv[1:]
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
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


def test_a_saved_model_can_be_placed_automatically_and_in_half_precision(processor, picture_file, tmp_path):
    for head, model in save_all(processor, tmp_path).items():
        expected = scores_of(model, processor, picture_file)
        placed = ClipNDModel.from_pretrained(tmp_path / head, device_map="auto")
        np.testing.assert_allclose(scores_of(placed, processor, picture_file), expected, rtol=1e-5)
        half = ClipNDModel.from_pretrained(tmp_path / head, dtype=torch.bfloat16)
        assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
        np.testing.assert_allclose(scores_of(half, processor, picture_file), expected, rtol=0.1, atol=0.5)


def test_a_saved_model_scores_the_same_where_the_package_is_absent(processor, picture_file, tmp_path):
    models = save_all(processor, tmp_path)
    command = [sys.executable, "-c", REMOTE, str(picture_file), *(str(tmp_path / head) for head in models)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for model, line in zip(models.values(), done.stdout.splitlines(), strict=True):
        max_text_length, scores = json.loads(line)
        assert max_text_length == processor.max_text_length
        np.testing.assert_allclose(scores, scores_of(model, processor, picture_file), rtol=1e-5)
