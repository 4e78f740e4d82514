"""Text on its way to tokens: cleaned, cut around a name, encoded; for the processor. Flat: it travels to the Hub."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

CHARACTERS_PER_TOKEN = 16
"""A text is cut to this many characters for each token that it may have before it is split into tokens, so that a book
costs little more than a sentence. English has 4 or 5 to a token: only a text of very long words comes out shorter."""


def clean(text: Any) -> str:
    """The text with one space between words, none around them, and its accents composed, as CLIP's tokenizer has them.

    Half of a character (a lone surrogate) becomes a question mark: no tokenizer takes it.

    Raises:
        TypeError: If it is neither a string nor None.
    """
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string or None, not {type(text).__name__}")
    return " ".join(unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode()).split())


class _Folding(dict[int, str]):
    """A table for `str.translate`: each character in lower case and bare of accents, one for one, so places stay."""

    def __missing__(self, code: int) -> str:
        parts = unicodedata.normalize("NFD", chr(code))
        accents = all(unicodedata.combining(mark) >= 200 for mark in parts[1:])  # below: Japanese voicing, Hangul
        bare = parts[0] if accents else chr(code)
        folded = bare.casefold()
        self[code] = folded if len(folded) == 1 else bare
        return self[code]


_FOLDING = _Folding()


def find(name: str, text: str) -> int:
    """Where the name first stands in the text, as a word of its own if it does anywhere; 0 if it stands nowhere.

    Case and accents do not count.
    """
    if not name:
        return 0
    name, text = re.escape(name.translate(_FOLDING)), text.translate(_FOLDING)
    found = re.search(rf"(?<!\w){name}(?!\w)", text) or re.search(name, text)
    return found.start() if found else 0


def excerpt(name: str, text: str, reach: int) -> str:
    """At most ``reach`` characters before and from the first occurrence of the name, else from the beginning."""
    if len(text) <= reach:
        return text
    middle = find(name, text) if len(name) < reach else 0  # a longer name leaves no room for the text
    return text[max(0, middle - reach) : middle + reach]


def window_start(middle: int, width: int, size: int, words: Sequence[int | None]) -> int:
    """The first of ``size`` tokens that hold the ``width`` tokens from ``middle`` on in their midst, where they can.

    Args:
        middle: Where the tokens in the midst begin.
        width: Their number.
        size: Tokens of the window, fewer than there are.
        words: The word of each token. The window begins with one, unless that costs more than half of what it would
            show before the midst: text without spaces is one long word.
    """
    first = max(0, min(middle - max(0, size - width) // 2, len(words) - size))
    for start in range(first, (first + middle) // 2 + 1):
        if start == 0 or words[start] != words[start - 1]:
            return start
    return first


def encoder_of(tokenizer: CLIPTokenizer) -> Tokenizer:
    """What turns text into tokens without cutting or padding it, and takes the spelling of a special token for text.

    A copy: a tokenizer keeps the settings of its last call, and threads that ask for others get each other's.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # a text that spells the end-of-text token must not end there
    return encoder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """Learns a CLIP tokenizer of ``vocab_size`` tokens and the two special ones.

    As in CLIP's own vocabulary, every byte stands in it twice, within a word and at its end, so that no text has an
    unknown token: that is the end-of-text token, at the first of which CLIP pools. The special tokens come last, since
    old CLIP checkpoints pool at the largest id.
    """
    backend = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=symbols,  # numbered here, else as words come out of a hash table, and so pairs
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in model["merges"]][: max(0, vocab_size - len(symbols))]
    tokens = [*symbols, *("".join(merge) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
