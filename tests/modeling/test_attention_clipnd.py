from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3el_hf.modeling import attention_clipnd
from m3el_hf.modeling.attention_clipnd import averaged_attention

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


@pytest.fixture(params=["blocked", "fused"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways through, on a CPU: the one it takes there, and the one that other devices take."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fused":
            patch.setattr(attention_clipnd._BlockedAttention, "apply", attention_clipnd._fused_attention)
        yield request.param


def drawn(seed: int, asked: int, tokens: int, answering: int, keys: int, masked: bool = True) -> Inputs:
    """In fp64, with any tokens masked and weights of which some are zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = normal(asked, tokens).relu()
    mask = torch.rand(answering, keys, generator=generator) < 0.6 if masked else None
    return normal(asked, tokens, 3), weights, normal(answering, keys, 3), normal(answering, keys, 2), mask


def slow(query: Tensor, weights: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The formula for each pair, of the tokens that count."""
    context = torch.zeros(len(key), len(query), value.shape[-1], dtype=value.dtype)
    for b in range(len(key)):
        kept = torch.ones(key.shape[1], dtype=torch.bool) if mask is None else mask[b]
        for n in range(len(query)):
            for i in range(query.shape[1] if kept.any() else 0):
                logits = [(query[n, i] @ one / math.sqrt(key.shape[-1])).item() for one in key[b][kept]]
                powers = [math.exp(logit - max(logits)) for logit in logits]
                answer = sum(power / sum(powers) * one for power, one in zip(powers, value[b][kept], strict=True))
                context[b, n] += weights[n, i] * answer
    return context


sizes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    shape=sizes,
    masked=st.booleans(),
    budget=st.sampled_from([1, 100, 2**20]),
    group=st.integers(1, 3),
)
def test_it_is_the_formula_however_it_is_cut(path, seed, shape, masked, budget, group):
    inputs = drawn(seed, *shape, masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_clipnd, "CPU_BLOCK_BYTES", budget)
        patch.setattr(attention_clipnd, "GPU_BLOCK_BYTES", budget)
        patch.setattr(attention_clipnd, "CPU_GROUP", group)
        torch.testing.assert_close(averaged_attention(*inputs), slow(*inputs))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("budget", [1, 2**20])
def test_gradients_are_those_of_differences(path, monkeypatch, masked, budget):
    monkeypatch.setattr(attention_clipnd, "CPU_BLOCK_BYTES", budget)
    monkeypatch.setattr(attention_clipnd, "GPU_BLOCK_BYTES", budget)
    monkeypatch.setattr(attention_clipnd, "CPU_GROUP", 2)
    query, weights, key, value, mask = drawn(1, 4, 3, 3, 4, masked)
    if mask is not None:
        mask[1] = False
    tensors = [one.requires_grad_() for one in (query, key, value)]
    assert torch.autograd.gradcheck(lambda q, k, v: averaged_attention(q, weights, k, v, mask), tensors)


def test_logits_of_thousands_overflow_nothing(path):
    query, weights, key, value, mask = (one if one is None else one.float() for one in drawn(2, 3, 4, 2, 4, False))
    query = (1e4 * query).requires_grad_()
    context = averaged_attention(query, weights, key, value, mask)
    torch.testing.assert_close(context.double(), slow(query, weights, key, value, mask).double(), rtol=1e-4, atol=1e-4)
    context.sum().backward()
    assert query.grad.isfinite().all()


def test_an_answerer_without_tokens_answers_zeros(path):
    query, weights, key, value, mask = drawn(3, 2, 3, 2, 4)
    mask[0] = False
    mask[1, :2] = True
    context = averaged_attention(query, weights, key, value, mask)
    assert not context[0].any() and context[1].all()
