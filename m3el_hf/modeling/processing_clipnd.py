"""The processor: every bit of text and picture preparation, for both sides. Flat file: it travels to the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTokenizer
from transformers.processing_utils import ProcessorMixin

from .decoding_clipnd import decode_image, to_rgb

ImageInput = Image.Image | bytes | str | Path | dict | Tensor
"""A picture: PIL, encoded bytes, a file's path, an undecoded `datasets` picture, or pixels from `pixel_values`."""


class ClipNDProcessor(ProcessorMixin):
    """Prepares mentions and entities for `ClipNDModel`.

    A mention's text is its name and its context, an entity's its name and its description, cut to ``max_text_length``
    tokens, so the name always stays. Pictures are turned upright, flattened on white, and prepared as CLIP does.

    Args:
        image_processor: A CLIP image processor.
        tokenizer: A CLIP tokenizer.
        max_text_length: Tokens that a text is cut to, start and end included.

    Example:
        >>> from m3el_hf import ClipNDProcessor
        >>> processor = ClipNDProcessor.tiny(["Kansas, a band"])
        >>> batch = processor.mentions(names=["Kansas", None], images=[None, Image.new("RGB", (80, 60))])
        >>> batch["has_text"].tolist(), batch["has_image"].tolist(), batch["pixel_values"].shape
        ([True, False], [False, True], torch.Size([2, 3, 64, 64]))
    """

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil | None = None,
        tokenizer: CLIPTokenizer | None = None,
        max_text_length: int = 40,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.max_text_length = max_text_length

    @classmethod
    def tiny(cls, texts: Iterable[str], *, vocab_size: int = 1200, image_size: int = 64) -> ClipNDProcessor:
        """A processor for `ClipNDConfig.tiny`: a small vocabulary learnt from ``texts``, small pictures.

        Args:
            texts: What the vocabulary is learnt from: training texts only.
            vocab_size: Most tokens that are learnt, besides the two special ones; 512 are the bytes.
            image_size: Side of the square pictures, in pixels.
        """
        size = {"height": image_size, "width": image_size}
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size)
        return cls(image_processor, _train_tokenizer(texts, vocab_size))

    def mentions(
        self,
        names: Sequence[str | None] | None = None,
        contexts: Sequence[str | None] | None = None,
        images: Sequence[ImageInput | None] | None = None,
    ) -> dict[str, Any]:
        """Prepares n mentions; pass any of the three, None for what a row lacks.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[n, L]`` (None where no row has text), ``pixel_values``
            ``[n, 3, S, S]`` (None where no row has a picture), ``has_text`` and ``has_image`` ``[n]``: the arguments of
            `ClipNDModel.encode_mentions`.

        Raises:
            ValueError: If the lists differ in length or are all absent, or a picture cannot be decoded.
            TypeError: If a picture is of a type that cannot be one.
        """
        return self._prepare(names, contexts, images)

    def entities(
        self,
        names: Sequence[str | None] | None = None,
        descriptions: Sequence[str | None] | None = None,
        images: Sequence[ImageInput | None] | None = None,
    ) -> dict[str, Any]:
        """Prepares n entities; arguments, result and errors as in `mentions`."""
        return self._prepare(names, descriptions, images)

    def pixel_values(self, image: ImageInput) -> Tensor:
        """Prepares one picture: ``[3, S, S]``, resized, cropped and normalised as CLIP does.

        Raises:
            ValueError: If it cannot be decoded, or is an address: pictures are never fetched from the network.
            TypeError: If it is of a type that cannot be a picture.
        """
        if isinstance(image, Tensor):
            return image
        return torch.as_tensor(self.image_processor(_open(image), return_tensors="np")["pixel_values"][0])

    def _prepare(
        self,
        names: Sequence[str | None] | None,
        details: Sequence[str | None] | None,
        images: Sequence[ImageInput | None] | None,
    ) -> dict[str, Any]:
        if any(isinstance(values, str) for values in (names, details, images)):
            raise TypeError(
                "names, contexts or descriptions, and images must be lists, an entry a row; one is a string"
            )
        lengths = {len(values) for values in (names, details, images) if values is not None}
        if len(lengths) != 1:
            found = ", ".join(
                f"{label} {'absent' if values is None else len(values)}"
                for label, values in (("names", names), ("contexts or descriptions", details), ("images", images))
            )
            raise ValueError(f"names, contexts or descriptions, and images must be lists of one length: {found}")
        n = lengths.pop()
        nothing = [None] * n
        texts = [_join(name, detail) for name, detail in zip(names or nothing, details or nothing, strict=True)]
        pixels = [None if image is None else self.pixel_values(image) for image in images or nothing]
        has_text = torch.tensor([bool(text) for text in texts], dtype=torch.bool)
        has_image = torch.tensor([one is not None for one in pixels], dtype=torch.bool)
        batch: dict[str, Any] = {"input_ids": None, "attention_mask": None, "pixel_values": None}
        if has_text.any():
            tokens = self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.max_text_length,
                split_special_tokens=True,  # a text that spells the end-of-text token must not end there
                return_tensors="pt",
            )
            batch |= {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        if has_image.any():
            blank = torch.zeros_like(next(one for one in pixels if one is not None))
            batch["pixel_values"] = torch.stack([blank if one is None else one for one in pixels])
        return batch | {"has_text": has_text, "has_image": has_image}


# save_pretrained then writes these files beside the weights, for trust_remote_code.
ClipNDProcessor.register_for_auto_class("AutoProcessor")


def _join(name: str | None, detail: str | None) -> str:
    return ". ".join(part.strip() for part in (name, detail) if part and part.strip())


def _open(image: ImageInput) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or b""
    if isinstance(image, str) and "://" in image:
        raise ValueError(f"{image} is an address: download the picture and pass its bytes or its path")
    if isinstance(image, bytes | str | Path):
        try:
            return decode_image(image)
        except ValueError as reason:
            name = "a picture given as bytes" if isinstance(image, bytes) else str(image)
            raise ValueError(f"{name} {reason}") from reason
    raise TypeError(f"a picture must be PIL, bytes, a path or pixels, not {type(image).__name__}")


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """Learns a CLIP tokenizer of ``vocab_size`` tokens and the two special ones.

    As in CLIP's own vocabulary, every byte stands in it twice, within a word and at its end, so that no text has an
    unknown token: that is the end-of-text token, at the first of which CLIP pools. The special tokens come last, since
    old CLIP checkpoints pool at the largest id.
    """
    backend = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    symbols = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    merges: list[Any] = [tuple(merge) for merge in model["merges"]][: max(0, vocab_size - len(symbols))]
    tokens = [*symbols, *("".join(merge) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
