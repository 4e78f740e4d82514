"""ClipNDModel: one CLIP for mentions and entities, and a head that scores pairs. Flat file: it travels to the Hub."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .checks_clipnd import OTHER_WEIGHTS, check_encoded, check_inputs, check_labels, check_nothing_empty, check_views
from .configuration_clipnd import ClipNDConfig
from .encoded_clipnd import Encoded
from .fingerprint_clipnd import Fingerprint
from .losses_clipnd import loss_terms, weigh
from .matching_clipnd import Features, MatchingHead, MatchingScores, mean_of_present
from .offload_clipnd import home_of, with_weights_at_hand
from .pooling_clipnd import PoolingHead
from .released_clipnd import model_weights

ENTITY_BLOCK = 4096
"""How many entities are scored at a time: of each, several fp32 vectors of CLIP's width exist while it is."""

View = tuple[bool, bool, bool, bool]


@dataclass
class ClipNDOutput(ModelOutput):
    """What `ClipNDModel.forward` returns.

    Attributes:
        loss: The weighted sum of ``losses``; None without labels.
        scores: ``[R, N]``, each row's mention against each entity.
        losses: Each term's mean, by name: see `loss_terms`.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class ClipNDPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading, as transformers wants them."""

    config_class = ClipNDConfig
    base_model_prefix = "clipnd"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "MatchingHead"]  # noqa: RUF012

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
    - Head ``matching``: `MatchingHead` (arXiv 2412.10440); a pair that none of its branches can score, as
      where the two share no modality, is scored by ``clip``.
    - Head ``pooled``: as ``clip``, with the unit vectors of `PoolingHead` in place of CLIP's (arXiv 2108.02456).

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
        elif config.head == "pooled":
            self.pooling = PoolingHead(config)
        self._fingerprint = Fingerprint()
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialises what no checkpoint has set, CLIP's scale too, which CLIP itself leaves as it was in memory."""
        super().initialize_weights()
        init.constant_(self.clip.logit_scale, self.clip.config.logit_scale_init_value)

    @classmethod
    def from_clip(cls, path_or_id: str, **config: Any) -> ClipNDModel:
        """Starts from a pretrained CLIP, such as ``"openai/clip-vit-base-patch32"``; a head's own weights are random.

        As from `from_pretrained`, the model comes in evaluation mode. `ClipNDProcessor.from_pretrained` makes its
        processor of the same folder or id.

        Args:
            path_or_id: A folder or a Hub id of a CLIP checkpoint.
            **config: Arguments of `ClipNDConfig`, such as ``head="matching"``.

        Raises:
            ValueError: If the checkpoint is not a CLIP, or lacks a part of one.
            OSError: If there is no such checkpoint.
        """
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(path_or_id)
        if not isinstance(found, CLIPConfig):
            raise ValueError(
                f"{path_or_id} is a {found.model_type!r} checkpoint: from_clip takes a CLIP, with both its towers, its "
                "projections and its scale"
            )
        loaded: Any = CLIPModel.from_pretrained(path_or_id, output_loading_info=True)
        clip, loading = loaded
        if loading["missing_keys"]:
            lacking = ", ".join(sorted({name.split(".")[0] for name in loading["missing_keys"]}))
            raise ValueError(f"{path_or_id} holds no whole CLIP: it lacks weights of {lacking}")
        clip.text_model.eos_token_id = _true_eos_token_id(clip.config)
        model = cls(ClipNDConfig(clip.config, **config))
        model.clip = clip
        return model.eval()

    @classmethod
    def from_released_matching(
        cls,
        state_dict: Mapping[str, Any],
        *,
        bidirectional: bool = False,
        clip_config: CLIPConfig | dict[str, Any] | None = None,
    ) -> ClipNDModel:
        """Brings over a checkpoint that the matching network's released code trained (arXiv 2412.10440).

        The model then does as that code does: padding is attended to, so texts must be padded as they were in training
        (to 40 tokens), and self-similarities count as exp(0) in the contrastive loss.

        Weights that change no score are ignored: ``matcher.{text,image}_fc``, ``matcher.scale_*_layernorm``,
        ``multi_head_module``, whatever is named ``*loss*``, the ``position_ids`` of old checkpoints, and the
        cross-modal module of the other form, which is always there. `released_clipnd` tells which weight is which.

        Args:
            state_dict: Names ``encoder.*`` and ``matcher.*``, or a Lightning checkpoint that has them in
                ``["state_dict"]``.
            bidirectional: Which form was trained: ``matcher.cmmb`` if True, else ``matcher.cmm``.
            clip_config: Of the CLIP that it was trained from; None for ViT-B/32's.

        Raises:
            KeyError: If a weight is absent or unknown; the message names it.
            RuntimeError: If a weight has not the shape that ``clip_config`` gives it.
        """
        weights: Mapping[str, Tensor] = state_dict.get("state_dict", state_dict)
        width = "encoder.image_cls_fc.weight"
        if width not in weights:
            raise KeyError(f"{width} is not in the checkpoint")
        config = ClipNDConfig(
            clip_config,
            head="matching",
            matching_dim=len(weights[width]),
            matching_direction="bidirectional" if bidirectional else "unidirectional",
            contrastive_self="zero",
            mask_padding=False,
        )
        _true_eos_token_id(config.clip_config)
        model = cls(config)
        model.load_state_dict(model_weights(weights, model.state_dict(), bidirectional=bidirectional))
        return model.eval()

    def weights_fingerprint(self) -> str | None:
        """Names the weights that encode, adapters included; None where they are not at hand."""
        return self._fingerprint.of(self)

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
            ValueError: If a row has neither text nor picture (the message names it), or an argument is not as
                described: of another type, shape, number of rows or device, with tokens that the model does not know,
                or None where some row has something.
        """
        return self._encode_side("mentions", input_ids, attention_mask, pixel_values, has_text, has_image)

    def encode_entities(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        has_text: Tensor,
        has_image: Tensor,
    ) -> Encoded:
        """Encodes n entities, as `ClipNDProcessor.entities` prepares them; arguments as in `encode_mentions`.

        What is returned holds what scoring needs and no more, so that it can be kept: see `Encoded` and, for the head
        ``matching``, `MatchingEntities`.
        """
        return self._encode_side("entities", input_ids, attention_mask, pixel_values, has_text, has_image)

    @with_weights_at_hand
    def score(self, mentions: Encoded, entities: Encoded) -> MatchingScores:
        """Scores B mentions against N entities.

        Returns:
            ``total`` ``[B, N]`` in fp32 and each branch's scores. A pair of which a side shows nothing is -inf.

        Raises:
            ValueError: If the two lie on different devices or were encoded by other weights than the model has.
        """
        self._check_sides(mentions, entities)
        parts = [self._score(mentions, some) for some in _blocks(entities)]
        branches = {name: torch.cat([part.branches[name] for part in parts], 1) for name in parts[0].branches}
        return MatchingScores(torch.cat([part.total for part in parts], 1), branches)

    @with_weights_at_hand
    def score_views(self, mentions: Encoded, entities: Encoded, views: Sequence[View]) -> Tensor:
        """Scores B mentions against N entities as each of V views shows them, such as the nine tasks.

        A branch scores a pair alike in every view that has it, so all views take little longer than one.

        Args:
            mentions: What `encode_mentions` returned.
            entities: What `encode_entities` returned.
            views: Whether each shows mention text, mention picture, entity text, entity picture.

        Returns:
            The totals ``[V, B, N]`` in fp32. A pair of which a side shows nothing is -inf.

        Raises:
            ValueError: As `score` does.
        """
        self._check_sides(mentions, entities)
        return torch.cat([self._view_block(mentions, some, views) for some in _blocks(entities)], 2)

    def _view_block(self, mentions: Any, entities: Any, views: Sequence[View]) -> Tensor:
        branches = self.matching.branches(mentions, entities) if self.config.head == "matching" else None
        sides = [(mentions.show(*view[:2]), entities.show(*view[2:])) for view in views]
        return torch.stack([self._score(*pair, branches).total for pair in sides])

    @with_weights_at_hand
    def score_factorised(self, mentions: Encoded, entities: Encoded) -> tuple[Tensor, Tensor]:
        """Scores by dot products of one vector a side alone, and says how far `score` can be from that.

        Everything but the fine-grained term of the matching head is such a product, and that term is bounded by a
        constant of the entity. So the exact best k are found by this, and by `score` for the few entities whose bound
        can still beat the k-th best.

        Returns:
            ``factorised`` and ``bound``, both ``[B, N]`` in fp32, with ``|score.total - factorised| <= bound`` for the
            same encoded rows, rounding included; a pair of which a side shows nothing has -inf and 0. The bound is 0
            where nothing is left out, as with the heads ``clip`` and ``pooled``: there ``factorised`` is the score,
            which the last digits of a product of another number of rows may differ from.

        Raises:
            ValueError: As `score` does.
        """
        self._check_sides(mentions, entities)
        factorised, bounds = zip(*(self._factorised(mentions, some) for some in _blocks(entities)), strict=True)
        return torch.cat(factorised, 1), torch.cat(bounds, 1)

    def _factorised(self, mentions: Any, entities: Any) -> tuple[Tensor, Tensor]:
        if self.config.head != "matching":
            total = self._score(mentions, entities).total
            return total, torch.zeros_like(total)
        branches, bounds = self.matching.factorised(mentions, entities)
        shared = _shared(mentions, entities)
        total = self._with_clip(self.matching.combine(branches, *shared), mentions, entities).total
        bound = self.matching.combine(bounds, *shared).total
        return total, bound.masked_fill(bound == -math.inf, 0.0)  # where clip scores the pair, or nothing does

    def _score(self, mentions: Any, entities: Any, branches: dict[str, Tensor] | None = None) -> MatchingScores:
        if self.config.head != "matching":
            cosine = self._cosine(mentions, entities)
            return mean_of_present({self.config.head: cosine}, {self.config.head: _shown(mentions, entities)})
        branches = branches or self.matching.branches(mentions, entities)
        return self._with_clip(self.matching.combine(branches, *_shared(mentions, entities)), mentions, entities)

    def _with_clip(self, scores: MatchingScores, mentions: Encoded, entities: Encoded) -> MatchingScores:
        """Gives the pairs that no branch can score the score of the head ``clip``."""
        apart = _shown(mentions, entities) & _unscored(scores)
        return _fill(scores, apart, self._cosine(mentions, entities) if apart.any() else scores.total)

    def _cosine(self, mentions: Encoded, entities: Encoded) -> Tensor:
        """Returns the cosines of fused vectors times the scale ``[B, N]``."""
        with torch.autocast(mentions.text.device.type, enabled=False):
            scale = self.clip.logit_scale.float().exp().clamp(max=100)  # the cap of CLIP's own training
            return scale.to(mentions.text.device) * (mentions.fused @ entities.fused.T)

    def _check_sides(self, mentions: Encoded, entities: Encoded) -> None:
        config: Any = self.config
        check_encoded(mentions, entities, config, self._only_device())
        known = {one.fingerprint for one in (mentions, entities) if one.fingerprint is not None}
        mine = self._fingerprint.of(self) if known else None
        if len(known) > 1 or (mine is not None and known != {mine}):
            raise ValueError(OTHER_WEIGHTS)

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

        Raises:
            ValueError: If the arguments of an encoder are not as it takes them, there is not one label a mention, or a
                label, a row or a view is none.
        """
        encoded_mentions, encoded_entities = self._encode("mentions", mentions), self._encode("entities", entities)
        device = encoded_mentions.has_text.device
        if labels is not None:
            check_labels(labels, len(encoded_mentions), len(encoded_entities), self._only_device())
            labels = labels.to(device, torch.int64)
        if rows is None and views is None:
            rows = torch.arange(len(encoded_mentions), device=device)
            views = torch.ones(len(rows), 4, dtype=torch.bool, device=device)
        check_views(rows, views, len(encoded_mentions), self._only_device())
        assert rows is not None and views is not None, "checked above"
        rows, views = rows.to(device, torch.int64), views.to(device)
        if labels is None:
            return ClipNDOutput(scores=self._score_rows(encoded_mentions, encoded_entities, rows, views).total)
        scores, terms = loss_terms(self, encoded_mentions, encoded_entities, labels, rows, views)
        means = {name: summed / count for name, (summed, count) in terms.items() if count}
        return ClipNDOutput(loss=weigh(means, self.config), scores=scores, losses=means)

    @with_weights_at_hand
    def _score_rows(
        self, mentions: Any, entities: Any, rows: Tensor, views: Tensor, mine: slice = slice(None)
    ) -> MatchingScores:
        """Scores ``[R, N]`` of mentions ``rows`` ``[R]`` as ``views`` ``[R, 4]`` shows them and the entities."""
        branches = {}
        if self.config.head == "matching":
            first = mine.start or 0
            branches = {
                name: one[rows - first] for name, one in self.matching.branches(mentions[mine], entities).items()
            }
        return self._score_views(mentions, rows, entities, branches, views)

    def _score_views(
        self, asking: Encoded, rows: Tensor, asked: Encoded, branches: dict[str, Tensor], views: Tensor
    ) -> MatchingScores:
        """Scores rows of one side against all of the other, as views ``[R, 4]`` show the one and the other.

        A branch scores a pair alike in every task that has it, so ``branches`` ``[R, N]`` are computed once and only
        their mean, and the fused vectors, follow the view.
        """
        one = Encoded(
            text=asking.text[rows],
            image=asking.image[rows] if asking.image is not None else None,
            has_text=asking.has_text[rows] & views[:, 0],
            has_image=asking.has_image[rows] & views[:, 1],
        )
        cosine = one.text.new_zeros(len(rows), len(asked), dtype=torch.float32)
        shown = torch.zeros_like(cosine, dtype=torch.bool)
        for text, image in torch.unique(views[:, 2:], dim=0):
            chosen = (views[:, 2:] == torch.stack([text, image])).all(1)
            sides = one[chosen], asked.show(text, image)
            cosine[chosen], shown[chosen] = self._cosine(*sides), _shown(*sides)
        if self.config.head != "matching":
            return mean_of_present({self.config.head: cosine}, {self.config.head: shown})
        texts, images = _shared(one, asked)
        shared = texts & views[:, 2:3], images & views[:, 3:]
        scores = self.matching.combine(branches, *shared)
        return _fill(scores, shown & _unscored(scores), cosine)

    def _encode_side(
        self,
        side: str,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        has_text: Tensor,
        has_image: Tensor,
    ) -> Encoded:
        """Encodes n rows that a user gives, and marks which weights did; in training these change at each step."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        encoded = self._encode(side, inputs | {"has_text": has_text, "has_image": has_image})
        check_nothing_empty(encoded)
        return encoded if self.training else replace(encoded, fingerprint=self._fingerprint.of(self))

    def _encode(self, side: str, inputs: Mapping[str, Any]) -> Any:
        """Encodes n rows; a tower sees the rows that have its modality, and does not run where none has.

        Args:
            side: "mentions" or "entities".
            inputs: The arguments of `encode_mentions`, by name; a row may have nothing here.
        """
        check_inputs(side, inputs, self.config.clip_config, self._only_device())
        has_text, has_image = inputs["has_text"], inputs["has_image"]
        input_ids, attention_mask, pixel_values = (
            inputs.get(name) for name in ("input_ids", "attention_mask", "pixel_values")
        )
        text, text_tokens, text_mask = self._absent("text", has_text)
        if input_ids is not None and attention_mask is not None and has_text.any():
            out = self.clip.get_text_features(input_ids=input_ids[has_text], attention_mask=attention_mask[has_text])
            text = _spread(F.normalize(out.pooler_output, dim=-1), has_text)
            text_tokens = _spread(out.last_hidden_state, has_text)
            text_mask = _spread(attention_mask[has_text].bool(), has_text)
        image, image_tokens, _ = self._absent("vision", has_image)
        if pixel_values is not None and has_image.any():
            dtype = self.clip.text_projection.weight.dtype
            out = self.clip.get_image_features(pixel_values=pixel_values[has_image].to(dtype))
            image = _spread(F.normalize(out.pooler_output, dim=-1), has_image)
            image_tokens = _spread(out.last_hidden_state, has_image)
        home = home_of(self._scoring)  # a device_map may have put either tower elsewhere
        text, text_tokens, text_mask, has_text = (one.to(home) for one in (text, text_tokens, text_mask, has_text))
        image, image_tokens, has_image = (one.to(home) for one in (image, image_tokens, has_image))
        if self.config.head == "pooled":
            text, image = self.pooling.pool_text(text_tokens, text_mask), self.pooling.pool_image(image_tokens)
        if self.config.head != "matching":
            return Encoded(text=text, image=image, has_text=has_text, has_image=has_image)
        image_cls, image_tokens = self.image_cls_fc(image).to(home), self.image_tokens_fc(image_tokens).to(home)
        features = Features(text, text_tokens, text_mask, image_cls, image_tokens, has_text, has_image)
        encode = self.matching.mentions if side == "mentions" else self.matching.entities
        return replace(encode(features), image=image)

    def _absent(self, tower: str, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stands for the vectors, the one token and the mask of a tower that does not run."""
        config, dtype = self.config.clip_config, self.clip.text_projection.weight.dtype
        width = getattr(config, f"{tower}_config").hidden_size
        vectors = present.new_zeros(len(present), config.projection_dim, dtype=dtype)
        return vectors, present.new_zeros(len(present), 1, width, dtype=dtype), present.new_ones(len(present), 1)

    @property
    def _scoring(self) -> nn.Module:
        """The part that scores are computed by, and where."""
        return getattr(self, {"clip": "clip", "matching": "matching", "pooled": "pooling"}[self.config.head])

    def _only_device(self) -> torch.device | None:
        """The device of all weights; None where a ``device_map`` spreads them, and accelerate moves what is given."""
        return None if hasattr(self, "_hf_hook") else home_of(self)


# save_pretrained then writes these files beside the weights, for trust_remote_code.
ClipNDModel.register_for_auto_class("AutoModel")


def _shared(mentions: Encoded, entities: Encoded) -> tuple[Tensor, Tensor]:
    """Which pairs share text, and which share pictures; bool ``[B, N]``."""
    text = mentions.has_text.unsqueeze(1) & entities.has_text
    return text, mentions.has_image.unsqueeze(1) & entities.has_image


def _shown(mentions: Encoded, entities: Encoded) -> Tensor:
    """Of which pairs both sides show something; bool ``[B, N]``."""
    return (mentions.has_text | mentions.has_image).unsqueeze(1) & (entities.has_text | entities.has_image)


def _unscored(scores: MatchingScores) -> Tensor:
    """Which pairs no branch can score; bool ``[B, N]``."""
    return scores.total == -math.inf


def _fill(scores: MatchingScores, apart: Tensor, cosine: Tensor) -> MatchingScores:
    """Adds the branch ``clip``, which alone scores the pairs ``apart`` ``[B, N]``."""
    total = torch.where(apart, cosine, scores.total)
    return MatchingScores(total, scores.branches | {"clip": cosine.masked_fill(~apart, -math.inf)})


def _blocks(entities: Encoded) -> Iterator[Encoded]:
    return (entities[start : start + ENTITY_BLOCK] for start in range(0, max(1, len(entities)), ENTITY_BLOCK))


def _true_eos_token_id(config: CLIPConfig) -> int:
    """Repairs old configurations, which carry a wrong id and are pooled at the largest id: the end-of-text token's."""
    text: Any = config.text_config
    if text.eos_token_id == 2:
        text.eos_token_id = text.vocab_size - 1
    return text.eos_token_id


def _spread(values: Tensor, present: Tensor) -> Tensor:
    """Puts the rows of ``values`` where ``present`` is True and zeros elsewhere."""
    if len(values) == len(present):
        return values
    spread = values.new_zeros(len(present), *values.shape[1:])
    spread[present.to(values.device)] = values
    return spread
