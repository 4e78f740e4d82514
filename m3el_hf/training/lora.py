"""LoRA on both towers, through PEFT."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from m3el_hf.errors import M3ELError
from m3el_hf.modeling.configuration_clipnd import ClipNDConfig
from m3el_hf.modeling.modeling_clipnd import ClipNDModel

TARGETS = r".*\.(text_model|vision_model)\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
"""Every linear of every layer of both towers."""


def add_lora(model: ClipNDModel, *, rank: int = 8, alpha: int = 16, dropout: float = 0.0) -> PeftModel:
    """Freezes the model but for its projections and its head, and adds adapters to both towers.

    What `PeftModel.save_pretrained` writes names the folder or Hub id that the model was loaded from, and
    `AutoModel.from_pretrained` loads that before the adapters. A model that `ClipNDModel.from_clip` made was loaded
    from none, so save it once and load it from there::

        ClipNDModel.from_clip("openai/clip-vit-base-patch32", head="matching").save_pretrained("base")
        model = add_lora(ClipNDModel.from_pretrained("base"))

    CLIP's scale is no module, and stays as it is.

    Args:
        model: The model; it is changed in place.
        rank: Rank of the adapters.
        alpha: Scale of the adapters, over ``rank``.
        dropout: Dropout before the adapters.

    Raises:
        M3ELError: If ``model`` is no `ClipNDModel` or has adapters already, or ``rank`` is below 1.
    """
    if getattr(model, "peft_config", None):
        raise M3ELError("the model has adapters already: pass one without, such as merge_and_unload() returns")
    # By its type rather than its class, which is another one where it was loaded with trust_remote_code.
    if getattr(getattr(model, "config", None), "model_type", None) != ClipNDConfig.model_type:
        raise M3ELError(f"adapters are added to a ClipNDModel, and this is a {type(model).__name__}")
    if rank < 1:
        raise M3ELError(f"rank is {rank}: it must be at least 1")
    head = [name for name, _ in model.named_children() if name != "clip"]
    return get_peft_model(
        model,
        _Config(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=TARGETS,
            modules_to_save=["text_projection", "visual_projection", *head],
        ),
    )


class _Config(LoraConfig):
    """Says when it is saved that the adapters name no base: this may well be meant, but not by who uses AutoModel."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        if not self.base_model_name_or_path:
            warnings.warn(
                f"the adapters in {save_directory} name no base, for the model was not loaded from anywhere: load them "
                "by PeftModel.from_pretrained(base, folder), or save what merge_and_unload() returns; for AutoModel, "
                "save the base first and add_lora(ClipNDModel.from_pretrained(its folder))",
                stacklevel=3,
            )
        super().save_pretrained(save_directory, **kwargs)
