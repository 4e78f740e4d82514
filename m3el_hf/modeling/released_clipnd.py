"""Which weight of the released matching network (arXiv 2412.10440) is which of ours. Flat file, for the Hub.

| released | here |
|---|---|
| ``encoder.clip.*`` | ``clip.*`` |
| ``encoder.image_cls_fc.*``, ``encoder.image_tokens_fc.*`` | ``image_cls_fc.*``, ``image_tokens_fc.*`` |
| ``matcher.timm.*``, ``matcher.iimm.*`` | ``matching.text.*``, ``matching.image.*`` |
| ``matcher.cmm.*`` (unidirectional) or ``matcher.cmmb.*`` (bidirectional) | ``matching.cross.*`` |
| ... ``match_module.trans_linear.*``, ``fusion_module.linear.*`` | ... ``match.*``, ``fusion.*`` |
| ``matcher.{text,image}_{cls,tokens}_layernorm.*`` | ``matching.{text,image}_{cls,tokens}_layernorm.*`` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

IGNORED = re.compile(
    r"encoder\.clip\..*position_ids|matcher\.(text|image)_fc\..*|matcher\.scale_\w+_layernorm\..*"
    r"|matcher\.cmmb?\.multi_head_module\..*|(.*\.)?\w*loss\w*(\..*)?"
)
"""Weights that are there and change no score, and position numbers, which are no weights."""

_MATCHING = (
    ("text.", "timm."),
    ("image.", "iimm."),
    ("cross.match.", "{cross}.match_module.trans_linear."),
    ("cross.fusion.", "{cross}.fusion_module.linear."),
    ("cross.", "{cross}."),
)


def matching_names(names: Iterable[str], *, bidirectional: bool) -> dict[str, str]:
    """Returns the released name of each weight of a `MatchingHead`."""
    cross = "cmmb" if bidirectional else "cmm"

    def released(name: str) -> str:
        for ours, theirs in _MATCHING:
            if name.startswith(ours):
                return theirs.format(cross=cross) + name.removeprefix(ours)
        return name

    return {name: released(name) for name in names}


def model_weights(state_dict: Mapping[str, Tensor], names: Iterable[str], *, bidirectional: bool) -> dict[str, Tensor]:
    """Returns a released checkpoint's weights under the names of a `ClipNDModel` with a matching head.

    Args:
        state_dict: The checkpoint's.
        names: The model's own.
        bidirectional: Take the bidirectional cross-modal weights; the others, which that training left as they were,
            are ignored.

    Raises:
        KeyError: If a weight is absent, or one is neither known nor `IGNORED`; the message names it.
    """
    released = {}
    for name in names:
        if name.startswith("matching."):
            ours = name.removeprefix("matching.")
            released[name] = "matcher." + matching_names([ours], bidirectional=bidirectional)[ours]
        else:
            released[name] = f"encoder.{name}"
    for name in released.values():
        if name not in state_dict:
            raise KeyError(f"{name} is not in the checkpoint")
    idle = "matcher.cmm." if bidirectional else "matcher.cmmb."
    known = set(released.values())
    for name in state_dict:
        if name not in known and not name.startswith(idle) and not IGNORED.fullmatch(name):
            raise KeyError(f"{name} is no weight of the released matching network")
    return {ours: state_dict[theirs] for ours, theirs in released.items()}
