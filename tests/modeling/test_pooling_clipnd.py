from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3el_hf import ClipNDConfig
from m3el_hf.modeling.pooling_clipnd import PoolingHead, csra, csra_of_two


def slow_channel(values: list[float]) -> float:
    """Base and the mean of five attentions of one channel's tokens."""
    attended = [max(values)]
    for temperature in (2.0, 2.5, 3.5, 4.5):
        powers = [math.exp(temperature * (value - max(values))) for value in values]
        attended.append(sum(p * value for p, value in zip(powers, values, strict=True)) / sum(powers))
    return sum(values) / len(values) + sum(attended) / 5


def slow_csra(tokens: Tensor) -> Tensor:
    return torch.tensor([slow_channel(channel.tolist()) for channel in tokens.T], dtype=tokens.dtype)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3), tokens=st.integers(1, 6), scale=st.sampled_from([1, 1000.0]))
def test_tokens_are_pooled_by_the_formula_and_padding_counts_for_nothing(seed, rows, tokens, scale):
    values, mask = scale * drawn(seed, rows, tokens, 3), drawn(seed + 1, rows, tokens) > 0
    mask[:, seed % tokens] = True
    for pooled, kept in ((csra(values), torch.ones_like(mask)), (csra(values, mask), mask)):
        expected = [slow_csra(one[keep]) for one, keep in zip(values, kept, strict=True)]
        torch.testing.assert_close(pooled, torch.stack(expected))


def test_a_row_that_is_all_padding_is_finite_and_so_are_its_gradients():
    values = drawn(0, 2, 3, 4).float().requires_grad_()
    pooled = csra(values, torch.tensor([[False] * 3, [True, False, False]]))
    pooled.sum().backward()
    assert pooled.isfinite().all() and values.grad.isfinite().all()
    assert not values.grad[1, 1:].any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), times=st.integers(1, 50), scale=st.sampled_from([0.1, 1, 1000.0]))
def test_one_token_and_many_equal_ones_have_a_closed_form(seed, times, scale):
    once, often = (scale * one for one in drawn(seed, 2, 3, 4).relu())
    built = torch.cat([once.unsqueeze(1), often.unsqueeze(1).expand(-1, times, -1)], 1)
    torch.testing.assert_close(csra_of_two(once, often, times), csra(built))
    torch.testing.assert_close(csra_of_two(once, often, torch.full((3, 1), float(times)).double()), csra(built))


def test_the_closed_form_overflows_nothing():
    once, often = (torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]]))
    once.requires_grad_()
    pooled = csra_of_two(once, often, 40)
    pooled.sum().backward()
    assert pooled.isfinite().all() and once.grad.isfinite().all()


@pytest.mark.parametrize("mask_padding", [True, False])
def test_the_head_pools_projected_tokens_to_unit_vectors(mask_padding):
    config = ClipNDConfig.tiny(width=16, head="pooled", matching_dim=5, mask_padding=mask_padding)
    torch.manual_seed(0)
    head = PoolingHead(config).double()
    text, image = drawn(1, 3, 4, 16), drawn(2, 3, 6, 16)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    with torch.no_grad():
        pooled = head.pool_text(text, mask), head.pool_image(image)
        for row in range(3):
            kept = mask[row] if mask_padding else torch.ones(4, dtype=torch.bool)
            words, patches = slow_csra(head.text_fc(text[row][kept])), slow_csra(head.image_fc(image[row]))
            torch.testing.assert_close(pooled[0][row], words / words.norm())
            torch.testing.assert_close(pooled[1][row], patches / patches.norm())
