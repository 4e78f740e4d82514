"""Cross-modal matching: vectors of a side that hold both its text and its picture. Flat file: it travels to the Hub.

Both forms (arXiv 2412.10440, section 4.3) ask with ``M(p, q) = ReLU(W(softmax_j(p_i . W(q_j)) q))``, one W for both
uses. Where one vector answers, a softmax over one key is 1: every token of q gets the same answer, ReLU(W(x)).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .pooling_clipnd import csra_of_two


class CrossModalMatching(nn.Module):
    """What the two forms share: projections, gate and W. Sizes: n rows, L text tokens, P picture tokens, width d.

    Args:
        text_width: Of the text's vector, and of its tokens where they are read.
        image_width: Of the picture's vector and tokens.
        dim: Width d.
    """

    branches: tuple[str, ...]

    def __init__(self, text_width: int, image_width: int, dim: int) -> None:
        super().__init__()
        self.text_fc = nn.Linear(text_width, dim)
        self.image_fc = nn.Linear(image_width, dim)
        self.gate_fc = nn.Linear(dim, 1)
        self.gate_layer_norm = nn.LayerNorm(dim)
        self.match = nn.Linear(dim, dim)

    def ask(self, one: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns M(one, tokens) ``[n, d]`` of ``[n, d]`` and ``[n, L, d]``; ``mask`` ``[n, L]``: False for padding."""
        logits = (self.match(tokens) @ one.unsqueeze(-1)).squeeze(-1)
        if mask is not None:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        return self.match((logits.softmax(-1).unsqueeze(1) @ tokens).squeeze(1)).relu()

    def gated(self, one: Tensor, context: Tensor) -> Tensor:
        """Returns LN(one tanh(gate(one)) + context)."""
        return self.gate_layer_norm(one * self.gate_fc(one).tanh() + context)


class UnidirectionalMatching(CrossModalMatching):
    """The text asks the picture's tokens; the answer is gated against what they answer back.

    With t the text's vector and X the picture's tokens: p = M(t, X); r = CSRA(M(X, t)); g = sigmoid(F(r) + F(p));
    the result is LN(t tanh(gate(t)) + p g + r (1 - g)).
    """

    branches = ("cross",)

    def __init__(self, text_width: int, image_width: int, dim: int) -> None:
        super().__init__(text_width, image_width, dim)
        self.fusion = nn.Linear(dim, dim)

    def forward(
        self, text_cls: Tensor, text_tokens: Tensor, text_mask: Tensor, image_cls: Tensor, image_tokens: Tensor
    ) -> Tensor:
        """Returns ``[n, 1, d]``; the text's tokens and the picture's vector are not read."""
        text, image = self.text_fc(text_cls), self.image_fc(image_tokens)
        from_image = self.ask(text, image)
        from_text = 2 * self.match(text).relu()  # base and mean of attentions of equal tokens, so twice the token
        gate = torch.sigmoid(self.fusion(from_text) + self.fusion(from_image))
        return self.gated(text, from_image * gate + from_text * (1 - gate)).unsqueeze(1)


class BidirectionalMatching(CrossModalMatching):
    """Text asks the picture's tokens, and picture the text's, with the same weights.

    ``f(x, Y) = LN(x tanh(gate(x)) + CSRA([M(x, Y); M(Y, x)]))``, once of the text's vector and the picture's tokens,
    once of the picture's vector and the text's tokens. M(Y, x) is as many equal rows as Y has tokens.
    """

    branches = ("text_image", "image_text")

    def forward(
        self, text_cls: Tensor, text_tokens: Tensor, text_mask: Tensor, image_cls: Tensor, image_tokens: Tensor
    ) -> Tensor:
        """Returns ``[n, 2, d]`` of vectors ``[n, w]``, tokens ``[n, L or P, w]`` and ``[n, L]``, False for padding."""
        patches = self.image_fc(image_tokens)
        words, count = self.text_fc(text_tokens), text_mask.sum(1, keepdim=True).clamp(min=1)
        text_image = self._fuse(self.text_fc(text_cls), patches, None, patches.shape[1])
        image_text = self._fuse(self.image_fc(image_cls), words, text_mask, count.to(words.dtype))
        return torch.stack([text_image, image_text], 1)

    def _fuse(self, one: Tensor, tokens: Tensor, mask: Tensor | None, count: Tensor | int) -> Tensor:
        return self.gated(one, csra_of_two(self.ask(one, tokens, mask), self.match(one).relu(), count))
