"""What is kept of encoded mentions and entities: what scoring needs, and no more. Flat file, for the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(kw_only=True)
class Encoded:
    """Encoded mentions or entities, n rows, for the heads ``clip`` and ``pooled``.

    What a row lacks is marked absent, and its values say nothing. Scores are computed in fp32 whatever type is kept.
    ``torch.save`` and ``torch.load`` keep it on disk.

    Attributes:
        text: ``[n, D]``, unit vectors: CLIP's, or those of `PoolingHead`.
        image: ``[n, D]``, likewise; None where a `MatchingHead` is used without a model.
        has_text: ``[n]`` bool.
        has_image: ``[n]`` bool.
        fingerprint: Of the weights that encoded them; None where unknown, as in training.
    """

    text: Tensor
    image: Tensor | None
    has_text: Tensor
    has_image: Tensor
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.has_text)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Selects rows, as a tensor of indices, a bool mask or a slice does."""
        return self._replace({name: value[rows] for name, value in self.tensors().items()})

    def _replace(self, tensors: dict[str, Any]) -> Self:
        return replace(self, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of each row, by attribute."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All rows of ``parts``, in their order; where texts are of different lengths, the shorter are padded.

        Raises:
            ValueError: If there are no parts, or different weights encoded them.
        """
        if not parts:
            raise ValueError("nothing to join: give at least one part")
        if len({part.fingerprint for part in parts}) > 1:
            raise ValueError("the parts were encoded by different weights: encode them again")
        columns = {name: [part.tensors()[name] for part in parts] for name in parts[0].tensors()}
        return parts[0]._replace({name: _cat(column) for name, column in columns.items()})

    def show(self, text: Tensor | bool = True, image: Tensor | bool = True) -> Self:
        """Hides modalities: True shows them, as a tensor ``[n]`` row by row. This is how a task is applied."""
        return replace(self, has_text=self.has_text & text, has_image=self.has_image & image)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves to a device, and numbers to a type, such as ``torch.float16`` to be kept; None changes nothing.

        Raises:
            ValueError: If a number is too large for the type.
        """
        result = {}
        for name, value in self.tensors().items():
            result[name] = value.to(device, dtype if value.is_floating_point() else None)
            if result[name].dtype != value.dtype and (result[name].isinf() & ~value.isinf().to(device)).any():
                raise ValueError(f"{name} has numbers beyond what {dtype} holds: keep torch.bfloat16 or torch.float32")
        return self._replace(result)

    @property
    def bytes_per_row(self) -> int:
        """How many bytes a row takes."""
        return sum(value[:1].nbytes for value in self.tensors().values())

    @property
    def fused(self) -> Tensor:
        """``[n, D]`` fp32: the unit vector of the sum of what is present; zeros where nothing is."""
        assert self.image is not None, "features without unit picture vectors have no fused vector"
        text = self.text.float() * self.has_text.unsqueeze(-1)
        image = self.image.float() * self.has_image.unsqueeze(-1)
        return F.normalize(text + image, dim=-1)


def _cat(values: list[Tensor]) -> Tensor:
    """Rows of ``[n, L, ...]`` one after another, with zeros (for a mask: False) up to the largest L."""
    if values[0].ndim == 1 or len({value.shape[1] for value in values}) == 1:
        return torch.cat(values)
    length = max(value.shape[1] for value in values)
    padding = [0, 0] * (values[0].ndim - 2)
    return torch.cat([F.pad(value, [*padding, 0, length - value.shape[1]]) for value in values])


@dataclass(kw_only=True)
class MatchingSide(Encoded):
    """What both sides keep for the matching head; the other attributes are those of `Encoded`.

    Attributes:
        image_cls: ``[n, d]``, the projected picture vector, before its LayerNorm.
        text_mask: ``[n, L]``, True for tokens that count.
        cross: ``[n, k, d]``, the vector of each cross-modal branch.
    """

    image_cls: Tensor
    text_mask: Tensor
    cross: Tensor

    @property
    def text_cls(self) -> Tensor:
        """``[n, dt]``, the unit text vector, before its LayerNorm."""
        return self.text


@dataclass(kw_only=True)
class MatchingMentions(MatchingSide):
    """Encoded mentions of the matching head: tokens as keys and values.

    Attributes:
        text_keys: ``[n, L, d]``.
        text_values: ``[n, L, d]``.
        image_keys: ``[n, P, d]``.
        image_values: ``[n, P, d]``.
    """

    text_keys: Tensor
    text_values: Tensor
    image_keys: Tensor
    image_values: Tensor


@dataclass(kw_only=True)
class MatchingEntities(MatchingSide):
    """Encoded entities of the matching head: tokens as queries, which are d wide where the tokens are wider.

    Attributes:
        text_queries: ``[n, L, d]``.
        text_global: ``[n, d]``, what the fine-grained text term is projected on.
        image_queries: ``[n, P, d]``.
        image_global: ``[n, d]``, likewise of the picture.
    """

    text_queries: Tensor
    text_global: Tensor
    image_queries: Tensor
    image_global: Tensor


# Dataclasses of tensors: torch.load may read what torch.save wrote of them, without weights_only=False.
torch.serialization.add_safe_globals([Encoded, MatchingMentions, MatchingEntities])
