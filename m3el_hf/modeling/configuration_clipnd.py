"""The configuration of ClipNDModel. Flat file: it travels to the Hub and imports nothing of m3el_hf."""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig
from transformers.configuration_utils import PretrainedConfig

HEADS = ("clip", "matching")


class ClipNDConfig(PretrainedConfig):
    """Configures a `ClipNDModel`: one CLIP for both sides, and the head that scores a mention against an entity.

    Args:
        clip_config: The CLIP configuration (a `CLIPConfig` or its dict); None for ViT-B/32's.
        head: ``"clip"``, the cosine of fused CLIP vectors (CLIPND, arXiv 2410.18096), or ``"matching"``, the
            unidirectional multi-level matching network (arXiv 2412.10440, section 4).
        matching_dim: Width d of the matching head.
        contrastive_temperature: Temperature of the intra-modal contrastive loss (arXiv 2412.10440, section 4.1).
        contrastive_intra_weight: Weight of same-side pairs in that loss.
        contrastive_weight: Weight of that loss in the training loss; 0 leaves it out.
        contrastive_self: ``"exclude"`` leaves a row's similarity to itself out of that loss's denominator, as the
            paper's text has it; ``"zero"`` counts it as exp(0), as the released code does.

    Raises:
        ValueError: If a value is none of those named above.

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
        contrastive_temperature: float = 0.03,
        contrastive_intra_weight: float = 0.8,
        contrastive_weight: float = 1.0,
        contrastive_self: str = "exclude",
        **kwargs: Any,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head is {head!r}: choose one of {', '.join(HEADS)}")
        if contrastive_self not in ("exclude", "zero"):
            raise ValueError(f"contrastive_self is {contrastive_self!r}: choose 'exclude' or 'zero'")
        if isinstance(clip_config, dict):
            clip_config = CLIPConfig(**clip_config)
        self.clip_config = clip_config if clip_config is not None else CLIPConfig()
        self.head = head
        self.matching_dim = matching_dim
        self.contrastive_temperature = contrastive_temperature
        self.contrastive_intra_weight = contrastive_intra_weight
        self.contrastive_weight = contrastive_weight
        self.contrastive_self = contrastive_self
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


# save_pretrained then writes these files beside the weights, for trust_remote_code.
ClipNDConfig.register_for_auto_class()
