"""LoRA on both towers, through PEFT."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model

from m3el_hf.modeling.modeling_clipnd import ClipNDModel

TARGETS = r".*\.(text_model|vision_model)\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
"""Every linear of every layer of both towers."""


def add_lora(model: ClipNDModel, *, rank: int = 8, alpha: int = 16, dropout: float = 0.0) -> PeftModel:
    """Freezes the model but for its projections and its head, and adds adapters to both towers.

    Args:
        model: The model; it is changed in place.
        rank: Rank of the adapters.
        alpha: Scale of the adapters, over ``rank``.
        dropout: Dropout before the adapters.
    """
    whole = ["text_projection", "visual_projection"]
    if model.config.head == "matching":
        whole += ["matching", "image_cls_fc", "image_tokens_fc"]
    if model.config.head == "pooled":
        whole += ["pooling"]
    return get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, modules_to_save=whole),
    )
