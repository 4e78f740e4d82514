from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel

from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor, M3ELError, add_lora
from m3el_hf.sources import load_model
from m3el_hf.training import loop
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.loop import train
from tests.conftest import tiny_model

HEADS: dict[str, dict[str, Any]] = {
    "clip": {"head": "clip"},
    "unidirectional": {"head": "matching"},
    "bidirectional": {"head": "matching", "matching_direction": "bidirectional"},
    "pooled": {"head": "pooled"},
}

LOADED_ELSEWHERE = """
import sys
import torch
{start}
from transformers import AutoModel, AutoProcessor

for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder + "/adapter", trust_remote_code={trust})
    processor = AutoProcessor.from_pretrained(folder + "/base", trust_remote_code={trust})
    saved = torch.load(folder + "/scores.pt")
    sides = (processor.mentions(**saved["mentions"]), processor.entities(**saved["entities"]))
    with torch.no_grad():
        total = model.score(model.encode_mentions(**sides[0]), model.encode_entities(**sides[1])).total
    torch.testing.assert_close(total, saved["total"], rtol=1e-5, atol=1e-5)
"""

MENTIONS = {"names": ["Kansas"] * 2, "contexts": ["a band", None], "images": [torch.ones(3, 64, 64), None]}
ENTITIES = {
    "names": ["Kansas", "Kansas", None],
    "descriptions": ["a state", "a band", None],
    "images": [torch.zeros(3, 64, 64), None, torch.ones(3, 64, 64).tril()],
}


def encode(model, processor: ClipNDProcessor):
    with torch.no_grad():
        return (
            model.encode_mentions(**processor.mentions(**MENTIONS)),
            model.encode_entities(**processor.entities(**ENTITIES)),
        )


def scores(model, processor: ClipNDProcessor) -> Tensor:
    with torch.no_grad():
        return model.score(*encode(model, processor)).total


def disturb(model: nn.Module) -> None:
    """Changes what would be trained, as training would, with no two runs alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def save_base(folder: Path, processor: ClipNDProcessor, head: str) -> Path:
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    config = ClipNDConfig.tiny(len(tokenizer), tokenizer.eos_token_id, width=32, **HEADS[head])
    ClipNDModel(config).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory) -> dict[str, Path]:
    """For each head a folder of a base, of trained adapters, of both merged, and of the scores before saving."""
    folders = {}
    for head in HEADS:
        folder = folders[head] = tmp_path_factory.mktemp(head)
        base = ClipNDModel.from_pretrained(save_base(folder, processor, head))
        before = scores(base, processor)
        trained = add_lora(base, rank=2)
        disturb(trained)
        total = scores(trained, processor)
        assert not torch.allclose(total, before, atol=1e-3)
        torch.save({"total": total, "mentions": MENTIONS, "entities": ENTITIES}, folder / "scores.pt")
        trained.save_pretrained(folder / "adapter")
        trained.merge_and_unload().save_pretrained(folder / "merged")
    return folders


@pytest.mark.parametrize("head", HEADS)
def test_however_they_are_loaded_adapters_score_as_they_were_trained(head, saved, processor):
    folder = saved[head]
    wrapped = PeftModel.from_pretrained(ClipNDModel.from_pretrained(folder / "base"), folder / "adapter")
    added = ClipNDModel.from_pretrained(folder / "base")
    added.load_adapter(str(folder / "adapter"))
    loaded = {
        "PeftModel": wrapped,
        "AutoModel": AutoModel.from_pretrained(folder / "adapter"),
        "ClipNDModel": ClipNDModel.from_pretrained(folder / "adapter"),
        "load_adapter": added,
        "merged and saved": AutoModel.from_pretrained(folder / "merged"),
    }
    results = {name: scores(model, processor) for name, model in loaded.items()}
    merged = wrapped.merge_and_unload()
    results["merged"] = scores(merged, processor)
    assert type(loaded["AutoModel"]) is type(loaded["merged and saved"]) is type(merged) is ClipNDModel
    expected = torch.load(folder / "scores.pt")["total"]
    for name, total in results.items():
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    add_lora(merged)  # training may go on


@pytest.mark.parametrize(
    ("start", "trust"), [("import m3el_hf", False), ("sys.modules['m3el_hf'] = None  # as where it is missing", True)]
)
def test_another_process_loads_them_by_auto_model(start, trust, saved, tmp_path):
    code = LOADED_ELSEWHERE.format(start=start, trust=trust)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, saved.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("head", HEADS)
def test_adapters_of_vit_b_32_take_less_than_a_twentieth_of_its_weights(head):
    with torch.device("meta"):
        model = ClipNDModel(ClipNDConfig(**HEADS[head]))
        whole = model.num_parameters()
        assert 151e6 < whole < 152e6
        adapted = add_lora(model)
    assert adapted.num_parameters(only_trainable=True) < 0.025 * whole  # measured on disk: 1.9 to 2.2 %


@pytest.mark.parametrize("head", HEADS)
def test_of_the_towers_only_adapters_are_trained_and_all_of_the_rest(head, saved):
    plain = ClipNDModel.from_pretrained(saved[head] / "base")
    rest = {name for name, _ in plain.named_parameters() if not name.startswith(("clip.text_model", "clip.vision_mod"))}
    trained = add_lora(plain, rank=2).base_model.model
    trainable = {name for name, one in trained.named_parameters() if one.requires_grad}
    adapters = {name for name in trainable if "lora_" in name}
    for tower in ("text_model", "vision_model"):
        linears = {
            name for name, module in trained.named_modules() if tower in name and isinstance(module, nn.Linear)
        } - {name for name, _ in trained.named_modules() if "lora_" in name}
        assert len([name for name in adapters if tower in name]) == 2 * len(linears) == 2 * 2 * 6
    whole = {name.replace("modules_to_save.default.", "") for name in trainable - adapters}
    assert whole == rest - {"clip.logit_scale"}


@pytest.mark.parametrize("head", HEADS)
def test_training_changes_adapters_and_heads_and_no_other_bit(head, saved, processor, data, tmp_path, monkeypatch):
    model = ClipNDModel.from_pretrained(saved[head] / "base")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    after: dict[str, Tensor] = {}
    expected = []

    def save(run, name):
        trained = run.plain
        after.update(
            {name.removeprefix("base_model.model."): one.clone() for name, one in trained.state_dict().items()}
        )
        expected.append(scores(trained, processor))
        write(run, name)

    write = loop._Run._save_model
    monkeypatch.setattr(loop._Run, "_save_model", save)
    settings = TrainingArguments(
        tmp_path, lora=True, learning_rate=1e-2, warmup_steps=1, num_train_epochs=2, eval_steps=1e9, tasks_per_mention=9
    )
    rows = data["train"].select(range(16)), data["validation"].select(range(4))
    model, _ = train(model, processor, *rows, settings, progress=False)
    frozen = {name.replace(".base_layer", "").replace(".original_module", ""): one for name, one in after.items()}
    assert all(torch.equal(frozen[name], one) for name, one in before.items())
    adapters = [one for name, one in after.items() if "lora_B" in name]
    assert len(adapters) == 24 and all(one.any() for one in adapters)
    kept = {name: one for name, one in after.items() if "modules_to_save" in name}
    modules = {name.split(".modules_to_save")[0] for name in kept}
    if head == "pooled":
        modules -= {"clip.text_projection", "clip.visual_projection"}  # this head does not read them
    for module in modules:
        own = {name: one for name, one in kept.items() if name.startswith(module)}
        assert any(
            not torch.equal(before[name.replace("modules_to_save.default.", "")], one) for name, one in own.items()
        )
    for merged in (model, AutoModel.from_pretrained(tmp_path / "best")):
        assert type(merged) is ClipNDModel and not hasattr(merged, "peft_config")
        torch.testing.assert_close(scores(merged, processor), expected[-1], rtol=1e-5, atol=1e-5)


# Which weights encoded it.


def test_what_other_adapters_encoded_is_refused(saved, processor, tmp_path):
    folder = saved["bidirectional"]
    model = AutoModel.from_pretrained(folder / "adapter")
    mentions, entities = encode(model, processor)

    def refused(other) -> bool:
        for sides in ((mentions, encode(other, processor)[1]), (mentions, entities)):
            with pytest.raises(ValueError, match="encoded by other weights"):
                other.score(*sides)
        return True

    again = PeftModel.from_pretrained(ClipNDModel.from_pretrained(folder / "base"), folder / "adapter")
    again.score(mentions, entities)
    other = add_lora(ClipNDModel.from_pretrained(folder / "base"), rank=2)
    disturb(other)
    assert refused(other)
    assert refused(ClipNDModel.from_pretrained(folder / "base"))
    other.save_pretrained(tmp_path)
    again.load_adapter(tmp_path, "other")
    again.set_adapter("other")  # touches no weight
    assert refused(again)
    again.set_adapter("default")
    mentions, entities = encode(again, processor)
    with again.disable_adapter():
        assert refused(again)
    again.score(mentions, entities)
    # They encode alike but for rounding, and other bits are other weights.
    assert refused(AutoModel.from_pretrained(folder / "merged"))


# The base.


@pytest.fixture
def clip(processor, tmp_path) -> Path:
    """A plain CLIP, as the Hub has them."""
    tiny_model(processor).clip.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_from_a_plain_clip_the_base_is_saved_once(clip, processor, tmp_path):
    ClipNDModel.from_clip(str(clip), head="matching").save_pretrained(tmp_path / "base")
    trained = add_lora(ClipNDModel.from_pretrained(tmp_path / "base"))
    disturb(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    model, loaded = load_model(tmp_path / "adapter")
    torch.testing.assert_close(scores(model.cpu(), loaded), scores(trained, processor), rtol=1e-5, atol=1e-5)


def test_adapters_that_name_no_base_need_a_base_with_the_same_clip(clip, processor, tmp_path):
    trained = add_lora(ClipNDModel.from_clip(str(clip), head="matching"))
    disturb(trained)
    with pytest.warns(UserWarning, match=r"name no base.*PeftModel.from_pretrained\(base, folder\)"):
        trained.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    base = ClipNDModel.from_clip(str(clip), head="matching")  # another random head, which the adapters replace
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(scores(loaded, processor), scores(trained, processor), rtol=1e-5, atol=1e-5)
    with pytest.raises(M3ELError, match="^[^\n]+/adapter holds adapters that name no base: save the model [^\n]+$"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("clip", "this is a 'clip' checkpoint, not a 'clipnd' one: start from it with ClipNDModel.from_clip"),
        ("gone", "/gone"),
    ],
)
def test_a_base_that_is_none_is_named(base, says, clip, saved, processor, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(saved["clip"] / "adapter", adapter)
    processor.save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(M3ELError, match=f"^[^\n]*/adapter cannot be loaded as a model: [^\n]*{says}[^\n]*$"):
        load_model(adapter)


# Bad input.


def test_mistakes_get_one_line_and_leave_the_model_alone(processor, tmp_path):
    model = tiny_model(processor)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(M3ELError, match="^rank is 0: it must be at least 1$"):
        add_lora(model, rank=0)
    assert [name for name, _ in model.named_parameters()] == names
    for other in (model.clip, nn.Linear(2, 2)):
        with pytest.raises(M3ELError, match=f"added to a ClipNDModel, and this is a {type(other).__name__}$"):
            add_lora(other)
    for adapted in (add_lora(model), model):
        with pytest.raises(M3ELError, match="^the model has adapters already: [^\n]+$"):
            add_lora(adapted)
    with pytest.raises(M3ELError, match="^no such folder: [^\n]+$"):
        load_model(tmp_path / "nowhere")
