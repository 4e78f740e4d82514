"""ClipNDModel: one CLIP for mentions and entities, and a head that scores pairs. Flat file: it travels to the Hub."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_clipnd import ClipNDConfig
from .matching_clipnd import Features, MatchingHead, MatchingScores, mean_of_present


@dataclass
class Encoded:
    """Encoded mentions or entities, n rows; what a row lacks is zero and marked absent.

    Attributes:
        text: ``[n, D]``, unit CLIP vectors.
        image: ``[n, D]``, unit CLIP vectors.
        has_text: ``[n]`` bool.
        has_image: ``[n]`` bool.
        text_tokens: ``[n, L, H]`` for the matching head, else None.
        text_mask: ``[n, L]`` for the matching head, else None.
        image_cls: ``[n, d]`` for the matching head, else None.
        image_tokens: ``[n, P, d]`` for the matching head, else None.
    """

    text: Tensor
    image: Tensor
    has_text: Tensor
    has_image: Tensor
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    image_cls: Tensor | None = None
    image_tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.has_text)

    def __getitem__(self, rows: Tensor | slice) -> Encoded:
        """Selects rows, as a tensor of indices, a bool mask or a slice does."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return Encoded(**{name: None if value is None else value[rows] for name, value in values.items()})  # type: ignore[arg-type]

    def show(self, text: Tensor | bool = True, image: Tensor | bool = True) -> Encoded:
        """Hides modalities: True shows them, as a tensor ``[n]`` row by row. This is how a task is applied."""
        return replace(self, has_text=self.has_text & text, has_image=self.has_image & image)

    @property
    def fused(self) -> Tensor:
        """``[n, D]``: the unit vector of the sum of what is present; zeros where nothing is."""
        text = self.text * self.has_text.unsqueeze(-1)
        image = self.image * self.has_image.unsqueeze(-1)
        return F.normalize(text + image, dim=-1)


@dataclass
class ClipNDOutput(ModelOutput):
    """What `ClipNDModel.forward` returns.

    Attributes:
        loss: Mean cross-entropy over the rows; None without labels. The matching head adds that of each branch, over
            the rows whose gold it can score, and the contrastive loss (arXiv 2412.10440, section 4.4).
        scores: ``[R, N]``, each row's mention against each entity.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None


class ClipNDPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading, as transformers wants them."""

    config_class = ClipNDConfig
    base_model_prefix = "clipnd"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)


class ClipNDModel(ClipNDPreTrainedModel):
    """Scores mentions against entities, each shown as text, picture or both.

    - Head ``clip``: the unit vector of the sum of a side's unit CLIP vectors; cosine times the learned scale (CLIPND,
      arXiv 2410.18096).
    - Head ``matching``: `MatchingHead` (arXiv 2412.10440); a pair that shares no modality is scored by ``clip``.

    Example:
        >>> from m3el_hf import ClipNDConfig, ClipNDModel, ClipNDProcessor
        >>> processor = ClipNDProcessor.tiny(["Kansas, a band", "Kansas, a state"])
        >>> model = ClipNDModel(ClipNDConfig.tiny(len(processor.tokenizer), processor.tokenizer.eos_token_id)).eval()
        >>> prepared = processor.mentions(names=["Kansas"], contexts=["Kansas toured in 1976."])
        >>> mentions = model.encode_mentions(**prepared)
        >>> entities = model.encode_entities(
        ...     **processor.entities(names=["Kansas", "Kansas"], descriptions=["a band", "a state"])
        ... )
        >>> model.score(mentions, entities).total.shape
        torch.Size([1, 2])
    """

    def __init__(self, config: ClipNDConfig) -> None:
        super().__init__(config)
        self.clip = CLIPModel._from_config(config.clip_config)
        if config.head == "matching":
            clip: Any = config.clip_config
            self.image_cls_fc = nn.Linear(clip.projection_dim, config.matching_dim)
            self.image_tokens_fc = nn.Linear(clip.vision_config.hidden_size, config.matching_dim)
            self.matching = MatchingHead(config)
        self.post_init()

    @classmethod
    def from_clip(cls, path_or_id: str, **config: Any) -> ClipNDModel:
        """Starts from a pretrained CLIP, for example ``"openai/clip-vit-base-patch32"``; a matching head starts fresh.

        Args:
            path_or_id: A folder or a Hub id of a CLIP checkpoint.
            **config: Arguments of `ClipNDConfig`, such as ``head="matching"``.

        Raises:
            ValueError: If the checkpoint is not a CLIP.
            OSError: If there is no such checkpoint.
        """
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(path_or_id)
        if not isinstance(found, CLIPConfig):
            raise ValueError(f"{path_or_id} is a {found.model_type!r} checkpoint: from_clip takes a CLIP")
        clip = CLIPModel.from_pretrained(path_or_id)
        text: Any = clip.config.text_config
        if text.eos_token_id == 2:
            # Old checkpoints carry a wrong id and are pooled at the largest id, which is the end-of-text token's.
            text.eos_token_id = text.vocab_size - 1
            clip.text_model.eos_token_id = text.eos_token_id
        model = cls(ClipNDConfig(clip.config, **config))
        model.clip = clip
        return model

    def encode_mentions(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        has_text: Tensor,
        has_image: Tensor,
    ) -> Encoded:
        """Encodes n mentions, as `ClipNDProcessor.mentions` prepares them. Only the towers that some row needs run.

        Args:
            input_ids: ``[n, L]``, or None where no row has text.
            attention_mask: ``[n, L]``, 1 for tokens, or None where no row has text.
            pixel_values: ``[n, 3, S, S]``, or None where no row has a picture.
            has_text: ``[n]`` bool.
            has_image: ``[n]`` bool.

        Raises:
            ValueError: If a row has neither text nor picture; the message names it.
        """
        _check_rows(has_text, has_image)
        return self._encode(input_ids, attention_mask, pixel_values, has_text, has_image)

    def encode_entities(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        has_text: Tensor,
        has_image: Tensor,
    ) -> Encoded:
        """Encodes n entities, as `ClipNDProcessor.entities` prepares them; arguments as in `encode_mentions`."""
        _check_rows(has_text, has_image)
        return self._encode(input_ids, attention_mask, pixel_values, has_text, has_image)

    def score(self, mentions: Encoded, entities: Encoded) -> MatchingScores:
        """Scores B mentions against N entities.

        Returns:
            ``total`` ``[B, N]`` in fp32 and each branch's scores. A pair of which a side shows nothing is -inf.
        """
        scale = self.clip.logit_scale.float().exp().clamp(max=100)  # the cap of CLIP's own training
        cosine = scale * (mentions.fused.float() @ entities.fused.float().T)
        shown = (mentions.has_text | mentions.has_image).unsqueeze(1) & (entities.has_text | entities.has_image)
        if self.config.head == "clip":
            return mean_of_present({"clip": cosine}, {"clip": shown})
        scores = self.matching(_features(mentions), _features(entities))
        shared = torch.isfinite(scores.total)
        total = torch.where(shared, scores.total, cosine.masked_fill(~shown, -math.inf))
        return MatchingScores(total, scores.branches | {"clip": cosine.masked_fill(shared | ~shown, -math.inf)})

    def forward(
        self,
        mentions: dict[str, Any],
        entities: dict[str, Any],
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        views: Tensor | None = None,
    ) -> ClipNDOutput:
        """Encodes both sides once and scores each row's mention, as a task shows it, against all entities.

        A row's score is -inf for an entity that has nothing of what the row's task shows.

        Args:
            mentions: Arguments of `encode_mentions`.
            entities: Arguments of `encode_entities`.
            labels: ``[B]``, the index of each mention's gold among the entities; None for no loss.
            rows: ``[R]``, the mention of each row; None for every mention once, showing all that it has.
            views: ``[R, 4]`` bool, whether a row shows mention text, mention picture, entity text, entity picture.
                Given with ``rows``.

        Returns:
            The loss (None without labels) and the scores ``[R, N]``.
        """
        encoded_mentions, encoded_entities = self._encode(**mentions), self._encode(**entities)
        if rows is None or views is None:
            rows = torch.arange(len(encoded_mentions), device=encoded_mentions.has_text.device)
            views = torch.ones(len(rows), 4, dtype=torch.bool, device=rows.device)
        scores = self._score_views(
            encoded_mentions[rows].show(views[:, 0], views[:, 1]), encoded_entities, views[:, 2:]
        )
        if labels is None:
            return ClipNDOutput(scores=scores.total)
        loss = F.cross_entropy(scores.total, labels[rows])
        if self.config.head == "matching":
            loss = loss + _branch_loss(scores.branches, labels[rows])
            gold = _features(encoded_entities[labels])
            contrastive = self.matching.contrastive_loss(gold, _features(encoded_mentions), labels)
            loss = loss + self.config.contrastive_weight * contrastive
        return ClipNDOutput(loss=loss, scores=scores.total)

    def _score_views(self, mentions: Encoded, entities: Encoded, views: Tensor) -> MatchingScores:
        """Scores ``[R, N]`` row by row against the entities as ``views`` ``[R, 2]`` (text, picture) shows them."""
        nothing = mentions.text.new_full((len(mentions), len(entities)), -math.inf, dtype=torch.float32)
        scores = MatchingScores(nothing.clone(), {})
        for text, image in torch.unique(views, dim=0):
            chosen = (views == torch.stack([text, image])).all(1)
            shown = self.score(mentions[chosen], entities.show(text, image))
            scores.total[chosen] = shown.total
            for name, branch in shown.branches.items():
                scores.branches.setdefault(name, nothing.clone())[chosen] = branch
        return scores

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        has_text: Tensor,
        has_image: Tensor,
    ) -> Encoded:
        """Encodes n rows; a tower sees the rows that have its modality, and does not run where none has."""
        config, like = self.config, self.clip.text_projection.weight
        absent = like.new_zeros(len(has_text), config.clip_config.projection_dim)
        encoded = Encoded(absent, absent, has_text, has_image)
        if config.head == "matching":
            text_width = config.clip_config.text_config.hidden_size
            encoded.text_tokens = like.new_zeros(len(has_text), 1, text_width)
            encoded.text_mask = torch.ones(len(has_text), 1, dtype=torch.bool, device=like.device)
            encoded.image_cls = like.new_zeros(len(has_text), config.matching_dim)
            encoded.image_tokens = like.new_zeros(len(has_text), 1, config.matching_dim)
        if input_ids is not None and has_text.any():
            self._encode_text(encoded, input_ids[has_text], attention_mask[has_text])  # type: ignore[index]
        if pixel_values is not None and has_image.any():
            self._encode_image(encoded, pixel_values[has_image].to(like.dtype))
        return encoded

    def _encode_text(self, encoded: Encoded, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Fills the text fields of the rows that have text."""
        present = encoded.has_text
        out = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        encoded.text = _spread(F.normalize(out.pooler_output, dim=-1), present)
        if self.config.head == "matching":
            encoded.text_tokens = _spread(out.last_hidden_state, present)
            encoded.text_mask = _spread(attention_mask.bool(), present)

    def _encode_image(self, encoded: Encoded, pixel_values: Tensor) -> None:
        """Fills the picture fields of the rows that have a picture."""
        present = encoded.has_image
        out = self.clip.get_image_features(pixel_values=pixel_values)
        image = F.normalize(out.pooler_output, dim=-1)
        encoded.image = _spread(image, present)
        if self.config.head == "matching":
            encoded.image_cls = _spread(self.image_cls_fc(image), present)
            encoded.image_tokens = _spread(self.image_tokens_fc(out.last_hidden_state), present)


# save_pretrained then writes these files beside the weights, for trust_remote_code.
ClipNDModel.register_for_auto_class("AutoModel")


def _branch_loss(branches: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The sum of the matching branches' cross-entropies, each over the rows whose gold it can score."""
    losses = []
    for name, scores in branches.items():
        able = torch.isfinite(scores.gather(1, labels.unsqueeze(1)).squeeze(1))
        if name != "clip" and able.any():  # clip stands in for pairs that no branch can score: the total has it
            losses.append(F.cross_entropy(scores[able], labels[able]))
    return torch.stack(losses).sum() if losses else torch.zeros((), device=labels.device)


def _check_rows(has_text: Tensor, has_image: Tensor) -> None:
    empty = (~(has_text | has_image)).nonzero().flatten()
    if len(empty):
        raise ValueError(f"row {empty[0].item()} has neither text nor picture: there is nothing to link it by")


def _spread(values: Tensor, present: Tensor) -> Tensor:
    """Puts the rows of ``values`` where ``present`` is True and zeros elsewhere."""
    if len(values) == len(present):
        return values
    spread = values.new_zeros(len(present), *values.shape[1:])
    spread[present] = values
    return spread


def _features(side: Encoded) -> Features:
    assert side.text_tokens is not None and side.text_mask is not None, "encoded for another head"
    assert side.image_cls is not None and side.image_tokens is not None, "encoded for another head"
    return Features(
        side.text,
        side.text_tokens,
        side.text_mask,
        side.image_cls,
        side.image_tokens,
        side.has_text,
        side.has_image,
    )
