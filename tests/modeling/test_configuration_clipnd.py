from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, CLIPConfig

from m3el_hf import ClipNDConfig, ClipNDModel
from m3el_hf.modeling.configuration_clipnd import BRANCHES

OURS: dict[str, Any] = {
    "head": "matching",
    "matching_dim": 24,
    "contrastive_temperature": 0.07,
    "contrastive_intra_weight": 0.5,
    "contrastive_weight": 0.25,
    "contrastive_self": "zero",
    "matching_direction": "bidirectional",
    "matching_branches": ["image", "image_text"],
    "mask_padding": False,
    "format_version": 1,
}


def ours(config: ClipNDConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in OURS}


def test_defaults_are_the_papers():
    config = ClipNDConfig()
    assert config.head == "clip"
    assert config.matching_dim == 96
    assert (config.contrastive_temperature, config.contrastive_intra_weight) == (0.03, 0.8)
    assert config.contrastive_self == "exclude"
    assert config.mask_padding and config.matching_direction == "unidirectional"
    assert config.clip_config.to_dict() == CLIPConfig().to_dict()


def test_two_configurations_share_nothing():
    one, other = ClipNDConfig(), ClipNDConfig()
    one.clip_config.text_config.eos_token_id = 5
    assert other.clip_config.text_config.eos_token_id != 5


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_saved_configuration_loads_as_it_was(tmp_path, as_dict):
    clip = CLIPConfig(text_config={"hidden_size": 24, "num_attention_heads": 4}, projection_dim=24)
    config = ClipNDConfig(clip.to_dict() if as_dict else clip, **OURS)
    config.save_pretrained(tmp_path)
    for loaded in (ClipNDConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ClipNDConfig
        assert ours(loaded) == OURS
        assert loaded.clip_config.projection_dim == 24
        assert loaded.clip_config.text_config.to_dict() == clip.text_config.to_dict()
        assert loaded.clip_config.vision_config.to_dict() == clip.vision_config.to_dict()


def test_the_written_file_names_what_loads_it_without_the_package(tmp_path):
    ClipNDConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "clipnd"
    assert written["auto_map"]["AutoConfig"] == "configuration_clipnd.ClipNDConfig"
    assert (tmp_path / "configuration_clipnd.py").is_file()


@pytest.mark.parametrize(
    ("name", "wrong", "choices"),
    [
        ("head", "pool", "clip, matching, pooled"),
        ("head", None, "clip, matching, pooled"),
        ("contrastive_self", "one", "exclude, zero"),
        ("matching_direction", "both", "unidirectional, bidirectional"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(name, wrong, choices):
    with pytest.raises(ValueError, match=f"{name} is {wrong!r}: choose one of {choices}$"):
        ClipNDConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("direction", "named", "expected"),
    [
        ("unidirectional", None, ["text", "image", "cross"]),
        ("bidirectional", None, ["text", "image", "text_image", "image_text"]),
        ("unidirectional", ("cross", "text"), ["text", "cross"]),
        ("bidirectional", ["cross", "text"], ["text", "text_image", "image_text"]),
        ("bidirectional", ["cross", "image_text"], ["text_image", "image_text"]),
        ("bidirectional", ["image_text"], ["image_text"]),
    ],
)
def test_branches_are_named_in_any_order_and_cross_means_those_of_the_direction(direction, named, expected):
    config = ClipNDConfig(head="matching", matching_direction=direction, matching_branches=named)
    assert config.matching_branches == expected
    assert set(expected) <= set(BRANCHES[direction])


@pytest.mark.parametrize("wrong", [["texts"], ["text_image"], [], "text", 3, [["text"]]])
def test_what_is_no_branch_of_the_direction_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match=r"matching_branches is .*: the unidirectional form has text, image, cross;"):
        ClipNDConfig(matching_branches=wrong)


def test_a_configuration_of_before_there_were_branches_to_choose_has_all(tmp_path):
    ClipNDConfig(head="matching").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    assert written.pop("matching_branches") == ["text", "image", "cross"]
    file.write_text(json.dumps(written))
    assert ClipNDConfig.from_pretrained(tmp_path).matching_branches == ["text", "image", "cross"]


def edited(folder: Path, **keys: Any) -> Path:
    ClipNDConfig().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@pytest.mark.parametrize("wrong", [{"matching_dim": 0}, {"contrastive_temperature": 0.0}])
def test_a_width_or_a_temperature_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="both must be above 0$"):
        ClipNDConfig(**wrong)


def test_a_newer_format_is_refused_with_what_to_do(tmp_path):
    for read in (ClipNDConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="format 2, newer than 1, .* upgrade m3el_hf$"):
            read(edited(tmp_path, format_version=2))


def test_another_kind_of_model_is_refused(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    for read in (ClipNDConfig.from_pretrained, ClipNDModel.from_pretrained):  # which would get random weights
        with pytest.raises(ValueError, match="a 'clip' checkpoint, not a 'clipnd' one: .* ClipNDModel.from_clip$"):
            read(tmp_path)


def test_unknown_keys_are_kept(tmp_path):
    config = ClipNDConfig.from_pretrained(edited(tmp_path, something_new=[1, "a"]))
    assert config.something_new == [1, "a"]
    config.save_pretrained(tmp_path / "again")
    assert ClipNDConfig.from_pretrained(tmp_path / "again").something_new == [1, "a"]


def test_tiny_is_tiny_and_takes_the_tokenizers_ids():
    config = ClipNDConfig.tiny(700, 699, head="matching")
    assert sum(parameter.numel() for parameter in ClipNDModel(config).parameters()) < 1_000_000
    text = config.clip_config.text_config
    assert (text.vocab_size, text.eos_token_id, text.bos_token_id, text.pad_token_id) == (700, 699, 698, 699)
    assert config.matching_dim == 32
    assert ClipNDConfig.tiny(matching_dim=8).matching_dim == 8
