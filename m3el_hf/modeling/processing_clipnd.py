"""The processor: every bit of text and picture preparation, for both sides. Flat file: it travels to the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessorPil, CLIPTokenizer
from transformers.image_utils import SizeDict
from transformers.processing_utils import ProcessorMixin

from .decoding_clipnd import MAX_PIXELS, UnusableImageError, decode_image, to_rgb
from .texts_clipnd import CHARACTERS_PER_TOKEN, clean, encoder_of, excerpt, find, train_tokenizer, window_start

ImageInput = Image.Image | np.ndarray | bytes | str | Path | dict | Tensor
"""A picture: PIL, an array (uint8 ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``), encoded bytes, a file's path, an
undecoded `datasets` picture, or pixels from `ClipNDProcessor.pixel_values`."""

TEMPLATES = ("N", "D", "ND")
"""What an entity's text is made of: its name, its description, or both."""

COLUMNS = {"mention": ("mention", "context", "mention_image"), "entity": ("name", "description", "image")}
"""The dataset columns of a side: name, detail, picture."""


class ClipNDProcessor(ProcessorMixin):
    """Prepares mentions and entities for `ClipNDModel`.

    A mention's text is its name and its context, an entity's what ``template`` says, cut to ``max_text_length`` tokens.
    The name comes first, so it always stays. Of a context that is too long stay the words around the name's first
    occurrence in it; of any other text the first words. Pictures are turned upright, flattened on white, and prepared
    as CLIP does.

    One processor may serve several threads.

    Args:
        image_processor: A CLIP image processor; its settings are followed.
        tokenizer: A CLIP tokenizer, used as it is now: tokens that are added to it later are not known.
        max_text_length: Tokens that a text is cut to, start and end included.
        template: What an entity's text is made of, one of `TEMPLATES`. Saved, so that a model is used as it was
            trained. A mention's text is the same under each.

    Raises:
        ValueError: If ``max_text_length`` leaves no token for text or is above the tokenizer's ``model_max_length``, or
            ``template`` is not one of `TEMPLATES`.

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
        template: str = "ND",
        **kwargs: Any,
    ) -> None:
        if max_text_length < 3:
            raise ValueError(f"max_text_length must be 3 or more, for start, a token and end, not {max_text_length}")
        _check_template(template)
        super().__init__(image_processor, tokenizer)
        if max_text_length > self.tokenizer.model_max_length:
            raise ValueError(
                f"max_text_length is {max_text_length}, but the tokenizer's model takes no more than "
                f"{self.tokenizer.model_max_length} tokens: pass a max_text_length of at most that"
            )
        self.max_text_length = max_text_length
        self.template = template
        self._encoder = encoder_of(self.tokenizer)

    @classmethod
    def tiny(
        cls, texts: Iterable[str], *, vocab_size: int = 1200, image_size: int = 64, template: str = "ND"
    ) -> ClipNDProcessor:
        """A processor for `ClipNDConfig.tiny`: a small vocabulary learnt from ``texts``, small pictures.

        Args:
            texts: What the vocabulary is learnt from: training texts only.
            vocab_size: Most tokens that are learnt, besides the two special ones; 512 are the bytes.
            image_size: Side of the square pictures, in pixels.
            template: What an entity's text is made of, one of `TEMPLATES`.
        """
        size = {"height": image_size, "width": image_size}
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size)
        return cls(image_processor, train_tokenizer(texts, vocab_size), template=template)

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
            ValueError: If the lists differ in length or are all absent, or a picture cannot be used; then the message
                names the row.
            TypeError: If a text or a picture is of a type that cannot be one; the message names the row.
        """
        texts, pictures = _rows(names, contexts, images)
        return self._prepare(texts, pictures, around_name=True)

    def entities(
        self,
        names: Sequence[str | None] | None = None,
        descriptions: Sequence[str | None] | None = None,
        images: Sequence[ImageInput | None] | None = None,
        *,
        template: str | Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Prepares n entities; pass any of the three, None for what a row lacks.

        Args:
            names: Their names.
            descriptions: Their descriptions.
            images: Their pictures.
            template: One of `TEMPLATES`, or a list with one for each row; None for the processor's own. A row that has
                nothing of what its template shows has no text.

        Returns:
            As `mentions`.

        Raises:
            ValueError: As in `mentions`; also for an unknown template, and for a list of another length.
            TypeError: As in `mentions`.
        """
        texts, pictures = _rows(names, descriptions, images)
        template = self.template if template is None else template
        templates = template if isinstance(template, list | tuple) else [template] * len(texts)
        if len(templates) != len(texts):
            raise ValueError(f"a list of templates must have one for each row: {len(templates)} for {len(texts)} rows")
        shown = []
        for row, (one, (name, description)) in enumerate(zip(templates, texts, strict=True)):
            with _naming(row):
                _check_template(one)
            shown.append((name if "N" in one else "", description if "D" in one else ""))
        return self._prepare(shown, pictures, around_name=False)

    def from_rows(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], side: str) -> dict[str, Any]:
        """Prepares rows of a dataset, as it hands them out.

        That is ``rows[:8]``, what ``map(batched=True)`` and ``with_transform`` pass on, or a list of rows, as a
        ``DataLoader`` passes its ``collate_fn`` and as a streamed set is collected.

        The candidates of a row are not rows themselves: give its ``candidate_names``, ``candidate_descriptions`` and
        ``candidate_images`` to `entities`.

        Args:
            batch: A list for each column, or a list of rows. Of the side's `COLUMNS`, those that a task does not show
                may be absent.
            side: "mention" for rows of any config but ``entities``, "entity" for rows of that one.

        Returns:
            As `mentions`, but without the keys that would be None, which `datasets` does not take.

        Raises:
            ValueError: As in `mentions`; also if ``side`` is neither, or the batch has none of its columns.
            TypeError: As in `mentions`; also for a single row in place of a batch.

        Example:
            >>> from datasets import Dataset
            >>> from m3el_hf import ClipNDProcessor
            >>> processor = ClipNDProcessor.tiny(["Kansas, a band"])
            >>> rows = Dataset.from_dict({"mention": ["Kansas", None], "context": [None, "a band"]})
            >>> sorted(processor.from_rows(rows[:2], side="mention"))
            ['attention_mask', 'has_image', 'has_text', 'input_ids']
        """
        if side not in tuple(COLUMNS):
            raise ValueError(f"side must be 'mention' or 'entity', not {side!r}")
        by_column = _by_column(batch)
        columns = [by_column[column] if column in by_column else None for column in COLUMNS[side]]
        if all(column is None for column in columns):
            wanted, found = ", ".join(COLUMNS[side]), ", ".join(by_column) or "none"
            way_out = "; give a row's candidates to entities()" if "candidate_names" in by_column else ""
            raise ValueError(f"side {side!r} is prepared of the columns {wanted}; the batch has {found}{way_out}")
        prepared = self.mentions(*columns) if side == "mention" else self.entities(*columns)
        return {name: value for name, value in prepared.items() if value is not None}

    def pixel_values(self, image: ImageInput) -> Tensor:
        """Prepares one picture: ``[3, S, S]``, resized, cropped and normalised exactly as CLIP does.

        For that, a large JPEG is decoded in full: at a fraction of its size it would give other pixels.

        Raises:
            ValueError: If it cannot be decoded, is an address (pictures are never fetched from the network), or is an
                array or a tensor of another shape or type than `ImageInput` says.
            TypeError: If it is of a type that cannot be a picture.
        """
        if not isinstance(image, Tensor):
            return self._pixels(_open(image))
        expected = (3, *self._frame())
        if image.dtype != torch.float32 or image.shape != expected:
            raise ValueError(
                f"a tensor must be what pixel_values returns, torch.float32 {list(expected)}, not "
                f"{image.dtype} {list(image.shape)}"
            )
        return image

    def _frame(self) -> tuple[int, int]:
        """Height and width of every prepared picture."""
        settings = self.image_processor
        size = settings.crop_size if settings.do_center_crop else settings.size if settings.do_resize else None
        if not (size and size.height and size.width):
            raise ValueError("the image processor brings pictures to no common size: give it a crop_size")
        return size.height, size.width

    def _pixels(self, image: Image.Image) -> Tensor:
        """What `CLIPImageProcessorPil` makes of an RGB picture, bit for bit, without copying it in full.

        A byte has 256 values: CLIP's arithmetic is done on these, and every pixel looks its own up.
        """
        settings = self.image_processor
        height, width = self._frame()
        if settings.do_resize:
            image = image.resize(_resized(image.size, settings.size), settings.resample)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        bands = np.asarray(image.crop((left, top, left + width, top + height)))  # black beyond the picture
        values = (np.arange(256) * (settings.rescale_factor if settings.do_rescale else 1.0)).astype(np.float32)
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else ([0] * 3, [1] * 3)
        pixels = np.empty((3, height, width), np.float32)
        for band, (shift, unit) in enumerate(np.array([mean, std], np.float32).T):
            np.take((values - shift) / unit, bands[..., band], out=pixels[band], mode="clip")  # unbuffered: faster
        return torch.from_numpy(pixels)

    def _prepare(
        self, texts: list[tuple[str, str]], images: list[ImageInput | None], *, around_name: bool
    ) -> dict[str, Any]:
        pixels: list[Tensor | None] = []
        for row, image in enumerate(images):
            with _naming(row):
                pixels.append(None if image is None else self.pixel_values(image))
        has_text = torch.tensor([bool(name or detail) for name, detail in texts], dtype=torch.bool)
        has_image = torch.tensor([one is not None for one in pixels], dtype=torch.bool)
        batch: dict[str, Any] = {"input_ids": None, "attention_mask": None, "pixel_values": None}
        if has_text.any():
            special = self.tokenizer
            rows = [
                torch.tensor([special.bos_token_id, *ids, special.eos_token_id])
                for ids in self._token_ids(texts, around_name)
            ]
            batch["input_ids"] = pad_sequence(rows, batch_first=True, padding_value=special.pad_token_id)
            batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        if has_image.any():
            blank = torch.zeros(3, *self._frame())
            batch["pixel_values"] = torch.stack([blank if one is None else one for one in pixels])
        return batch | {"has_text": has_text, "has_image": has_image}

    def _token_ids(self, texts: list[tuple[str, str]], around_name: bool) -> list[list[int]]:
        """What stands between start and end in each row: the tokens of the name, then those of the detail that fit."""
        n, room = len(texts), self.max_text_length - 2
        reach = room * CHARACTERS_PER_TOKEN
        heads = [name[:reach] + ("." if name and detail else "") for name, detail in texts]
        details = [excerpt(name if around_name else "", detail, reach) for name, detail in texts]
        encoded = self._encoder.encode_batch(heads + details, add_special_tokens=False)
        rows = []
        for (name, _), text, head, detail in zip(texts, details, encoded[:n], encoded[n:], strict=True):
            left, first = max(0, room - len(head.ids)), 0
            if around_name and 0 < left < len(detail.ids):
                middle = detail.char_to_token(find(name, text)) or 0
                first = window_start(middle, len(head.ids), left, detail.word_ids)
            rows.append(head.ids[:room] + detail.ids[first : first + left])
        return rows


# save_pretrained then writes these files beside the weights, for trust_remote_code.
ClipNDProcessor.register_for_auto_class("AutoProcessor")


def _rows(
    names: Sequence[str | None] | None,
    details: Sequence[str | None] | None,
    images: Sequence[ImageInput | None] | None,
) -> tuple[list[tuple[str, str]], list[ImageInput | None]]:
    """Name and detail of each row, empty where it has none, and its picture."""
    lists = {"names": names, "contexts or descriptions": details, "images": images}
    given = [values for values in lists.values() if values is not None]
    if not given:
        raise ValueError(f"there is nothing to prepare: pass {', '.join(lists)}, or some of them")
    for values in given:
        if not _is_list(values):
            raise TypeError(
                "names, contexts or descriptions, and images must be lists, an entry a row, also for a single row; got "
                f"{type(values).__name__}"
            )
    lengths = {len(values) for values in given}
    if len(lengths) != 1:
        found = ", ".join(f"{label} {'absent' if one is None else len(one)}" for label, one in lists.items())
        raise ValueError(f"names, contexts or descriptions, and images must be lists of one length: {found}")
    nothing = [None] * lengths.pop()
    columns = [nothing if values is None else values for values in lists.values()]
    texts = []
    for row, (name, detail) in enumerate(zip(columns[0], columns[1], strict=True)):
        with _naming(row):
            texts.append((clean(name), clean(detail)))
    return texts, list(columns[2])


def _is_list(values: Any) -> bool:
    """Whether it has an entry for each row: neither one text or picture alone, nor a set or a generator."""
    if isinstance(values, np.ndarray | Tensor):
        return values.ndim > 0 and not (values.ndim == 3 and values.shape[2] in (3, 4))
    return hasattr(values, "__len__") and hasattr(values, "__getitem__") and not isinstance(values, str | bytes | dict)


def _by_column(batch: Any) -> Mapping[str, Any]:
    """The batch with a list for each column; a row that lacks another's column has None there."""
    if not isinstance(batch, list | tuple):
        if not hasattr(batch, "keys"):
            raise TypeError(
                f"a batch must have a list for each column, or be a list of rows, not {type(batch).__name__}"
            )
        return batch
    for number, row in enumerate(batch):
        with _naming(number):
            if not isinstance(row, Mapping):
                raise TypeError(f"a row must be a dict of columns, not {type(row).__name__}")
    return {
        column: [row.get(column) for row in batch] for column in dict.fromkeys(name for row in batch for name in row)
    }


@contextmanager
def _naming(row: int) -> Iterator[None]:
    """Puts the row before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"row {row}: {error}") from error


def _check_template(template: Any) -> None:
    if template not in TEMPLATES:
        raise ValueError(f"a template must be one of {', '.join(TEMPLATES)}, not {template!r}")


def _open(image: Any) -> Image.Image:
    """The picture as upright RGB; errors as in `ClipNDProcessor.pixel_values`."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or b""
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        raise ValueError(f"{_quoted(image)} is an address: download the picture and pass its bytes or its path")
    if not isinstance(image, Image.Image | np.ndarray | bytes | str | Path):
        raise TypeError(f"a picture must be PIL, an array, bytes, a path or pixels, not {type(image).__name__}")
    try:
        if isinstance(image, bytes | str | Path):
            return decode_image(image)
        return to_rgb(_from_array(image) if isinstance(image, np.ndarray) else image)
    except Exception as error:  # a file that PIL has opened but not read yet may be broken, and then raises anything
        given = "bytes" if isinstance(image, bytes) else "an array" if isinstance(image, np.ndarray) else "PIL"
        name = f"the file {_quoted(str(image))}" if isinstance(image, str | Path) else f"a picture given as {given}"
        reason = (
            error if isinstance(error, UnusableImageError) else f"cannot be decoded ({type(error).__name__}: {error})"
        )
        raise ValueError(f"{name} {reason}") from error


def _quoted(text: str) -> str:
    """The text in quotes on one line of a readable length."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def _from_array(pixels: np.ndarray) -> Image.Image:
    """A picture of bytes only: of fractions, or of larger numbers, nothing says which value is white."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise UnusableImageError(
            f"must be uint8 [H, W], [H, W, 3] or [H, W, 4] with 255 for white, not {pixels.dtype} {list(pixels.shape)}"
        )
    if 0 in pixels.shape:
        raise UnusableImageError("has no pixels")  # Pillow takes no empty array
    return Image.fromarray(pixels)


def _resized(size: tuple[int, int], target: SizeDict) -> tuple[int, int]:
    """Width and height to which CLIP resizes a picture of this width and height."""
    width, height = size
    if target.height and target.width:
        return target.width, target.height
    short = target.shortest_edge
    if not short or target.longest_edge:
        raise ValueError(f"the image processor's size must be shortest_edge, or height and width, not {dict(target)}")
    new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if new[0] * new[1] > MAX_PIXELS:
        raise ValueError(f"a picture of {width} x {height} is too long and thin: resized, it is {new[0]} x {new[1]}")
    return new
