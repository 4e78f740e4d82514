"""The configuration of ClipNDModel. Flat file: it travels to the Hub and imports nothing of m3el_hf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import CLIPConfig
from transformers.configuration_utils import PretrainedConfig

HEADS = ("clip", "matching", "pooled")
BRANCHES = {
    "unidirectional": ("text", "image", "cross"),
    "bidirectional": ("text", "image", "text_image", "image_text"),
}
"""Of the matching head, by direction."""

DIRECTIONS = tuple(BRANCHES)
SELF_TERMS = ("exclude", "zero")
FORMAT_VERSION = 1
"""Of the configurations written here; it grows when an older m3el_hf could no longer read what they say."""


class ClipNDConfig(PretrainedConfig):
    """Configures a `ClipNDModel`: one CLIP for both sides, and the head that scores a mention against an entity.

    Args:
        clip_config: The CLIP configuration (a `CLIPConfig` or its dict); None for ViT-B/32's.
        head: ``"clip"``, the cosine of fused CLIP vectors (CLIPND, arXiv 2410.18096); ``"matching"``, the multi-level
            matching network (arXiv 2412.10440, section 4); or ``"pooled"``, the cosine of one vector a side, pooled
            over its tokens (arXiv 2108.02456), for large knowledge bases.
        matching_dim: Width d of the matching head, and of the pooled head's vectors.
        matching_direction: How the matching head crosses modalities: ``"unidirectional"``, the text asks the picture,
            or ``"bidirectional"``, each asks the other.
        matching_branches: Those of the direction's `BRANCHES` that the matching head is trained with and scores by,
            as `named_branches` reads them; None for all. The others are left out everywhere: they are averaged into no
            score and bring no loss. Without ``"text"`` or ``"image"`` that modality has no contrastive loss either.
        contrastive_temperature: Temperature of the intra-modal contrastive loss (arXiv 2412.10440, section 4.1).
        contrastive_intra_weight: Weight of same-side pairs in that loss.
        contrastive_weight: Weight of that loss in the training loss; 0 leaves it out.
        branch_weight: Weight of the cross-entropy of each branch of the matching head, beside that of the total.
        entity_to_mention_weight: Weight of the cross-entropy from each gold to the mentions; 0 leaves it out, as both
            papers do.
        contrastive_self: ``"exclude"`` leaves a row's similarity to itself out of that loss's denominator, as the
            paper's text has it; ``"zero"`` counts it as exp(0), as the released code does.
        mask_padding: Whether padding tokens are left out of attention and pooling. False attends to them, as the
            released code does; scores then depend on how far a text is padded.
        format_version: Of the file this was read from.
        **kwargs: What every configuration of transformers takes; keys that nobody knows are kept.

    Raises:
        ValueError: If a value is none of those named above, the width or the temperature is not above 0,
            ``format_version`` is newer than this code, or the configuration read is of another kind of model.

    Example:
        >>> ClipNDConfig(head="matching").clip_config.vision_config.patch_size
        32
    """

    model_type = "clipnd"
    sub_configs = {"clip_config": CLIPConfig}  # noqa: RUF012 (transformers reads it as a class attribute)

    def __init__(
        self,
        clip_config: CLIPConfig | dict[str, Any] | None = None,
        head: str = "clip",
        matching_dim: int = 96,
        matching_direction: str = "unidirectional",
        matching_branches: Sequence[str] | None = None,
        contrastive_temperature: float = 0.03,
        contrastive_intra_weight: float = 0.8,
        contrastive_weight: float = 1.0,
        branch_weight: float = 1.0,
        entity_to_mention_weight: float = 0.0,
        contrastive_self: str = "exclude",
        mask_padding: bool = True,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        kind = kwargs.get("model_type", self.model_type)
        if kind != self.model_type:  # which transformers would take, and leave every weight random
            way_out = ": start from it with ClipNDModel.from_clip" if kind == "clip" else ""
            raise ValueError(f"this is a {kind!r} checkpoint, not a {self.model_type!r} one{way_out}")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this configuration has format {format_version}, newer than {FORMAT_VERSION}, the newest that this "
                "m3el_hf reads: upgrade m3el_hf"
            )
        _check_choice("head", head, HEADS)
        _check_choice("matching_direction", matching_direction, DIRECTIONS)
        _check_choice("contrastive_self", contrastive_self, SELF_TERMS)
        if matching_dim < 1 or contrastive_temperature <= 0:
            raise ValueError(
                f"matching_dim is {matching_dim} and contrastive_temperature {contrastive_temperature}: both must be "
                "above 0"
            )
        if isinstance(clip_config, dict):
            clip_config = CLIPConfig(**clip_config)
        self.clip_config = clip_config if clip_config is not None else CLIPConfig()
        self.head = head
        self.matching_dim = matching_dim
        self.matching_direction = matching_direction
        self.matching_branches = named_branches(matching_branches, matching_direction)
        self.contrastive_temperature = contrastive_temperature
        self.contrastive_intra_weight = contrastive_intra_weight
        self.contrastive_weight = contrastive_weight
        self.branch_weight = branch_weight
        self.entity_to_mention_weight = entity_to_mention_weight
        self.contrastive_self = contrastive_self
        self.mask_padding = mask_padding
        self.format_version = format_version
        super().__init__(**kwargs)

    @classmethod
    def tiny(
        cls,
        vocab_size: int = 1002,
        eos_token_id: int = 1001,
        *,
        width: int = 128,
        layers: int = 2,
        image_size: int = 64,
        patch_size: int = 16,
        **kwargs: Any,
    ) -> ClipNDConfig:
        """A configuration of under a million parameters, for CPU work from scratch.

        Args:
            vocab_size: The tokenizer's size.
            eos_token_id: The tokenizer's end-of-text id: CLIP pools there, and silently at position 0 if it is wrong.
            width: Hidden width of both towers and of their common space.
            layers: Layers of each tower.
            image_size: Side of the square pictures, in pixels.
            patch_size: Side of a patch, in pixels.
            **kwargs: Other arguments of `ClipNDConfig`.
        """
        tower = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "projection_dim": width,
        }
        text = {"vocab_size": vocab_size, "max_position_embeddings": 77, "eos_token_id": eos_token_id}
        text |= {"bos_token_id": eos_token_id - 1, "pad_token_id": eos_token_id}
        clip_config = CLIPConfig(
            text_config=tower | text,
            vision_config=tower | {"image_size": image_size, "patch_size": patch_size},
            projection_dim=width,
        )
        return cls(clip_config, **({"matching_dim": 32} | kwargs))


def named_branches(names: Sequence[str] | None, direction: str) -> list[str]:
    """Returns the branches of the matching head that are named, in the order of `BRANCHES`.

    Args:
        names: A list or tuple of branches of this direction. ``"cross"`` stands for the cross-modal branches of either:
            the one of the unidirectional form, both of the bidirectional. None for all.
        direction: The direction.

    Raises:
        ValueError: If there are none, or one is no branch of this direction.
    """
    branches = BRANCHES[direction]
    if names is None:
        return list(branches)
    known = list(dict.fromkeys([*branches, "cross"]))
    if not isinstance(names, list | tuple) or not names or any(name not in known for name in names):
        raise ValueError(
            f"matching_branches is {names!r}: the {direction} form has {', '.join(known)}; give a list of some, or "
            "None for all"
        )
    return [name for name in branches if name in names or ("cross" in names and name not in ("text", "image"))]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


# save_pretrained then writes these files beside the weights, for trust_remote_code.
ClipNDConfig.register_for_auto_class()
