"""The transcribed formulas, held against the released code's outputs, and `MatchingHead` held against them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.transcription import (
    attend_einsum,
    attend_matmul,
    csra,
    training_loss,
    transcribed_contrastive_loss,
    transcribed_scores,
)
from m3el_hf import ClipNDConfig
from m3el_hf.modeling import attention_clipnd, matching_clipnd
from m3el_hf.modeling.matching_clipnd import Features, MatchingHead, MatchingScores
from tests.conftest import real

INPUTS = {"text_cls": "text_cls", "text_tok": "text_tokens", "image_cls": "image_cls", "image_tok": "image_tokens"}
ATTEND = [attend_einsum, attend_matmul]
DIRECTIONS = ["unidirectional", "bidirectional"]
BRANCHES = {
    "unidirectional": ["text", "image", "cross"],
    "bidirectional": ["text", "image", "text_image", "image_text"],
}


@pytest.fixture(scope="module", autouse=True)
def _fp64_stays_fp64() -> Iterator[None]:
    """The head scores in fp32 whatever it is given; here in fp64, so that only the formulas can differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


# Against the released code, run once.


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    with np.load(real("oracle/matching_unidirectional.npz")) as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind == "f"}
    return {name: value.double() for name, value in found.items()}


@pytest.fixture
def released(oracle) -> MatchingHead:
    return MatchingHead.from_released({name.removeprefix("w."): oracle[name] for name in oracle}).double()


def side_of(oracle: dict[str, Tensor], side: str, rows: int | None = None) -> Features:
    """All rows have text and picture, and nothing is padded."""
    values = {ours: oracle[f"in.{side}.{theirs}"][:rows].clone().requires_grad_() for theirs, ours in INPUTS.items()}
    present = torch.ones(len(values["text_cls"]), dtype=torch.bool)
    mask = torch.ones(values["text_tokens"].shape[:2], dtype=torch.bool)
    return Features(**values, text_mask=mask, has_text=present, has_image=present)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value; below 1e-6 the released code's fp32 is noise."""
    tolerance = max(1e-5 * expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attend", ATTEND)
def test_transcribed_scores_are_those_of_the_released_code(oracle, released, attend):
    scores = transcribed_scores(released, side_of(oracle, "men"), side_of(oracle, "ent"), attend=attend)
    assert_near(scores.total, oracle["out.score"])
    for ours, theirs in (("text", "text"), ("image", "image"), ("cross", "image_text")):
        assert_near(scores.branches[ours], oracle[f"out.score_{theirs}"])


def test_transcribed_training_loss_and_gradients_are_those_of_the_released_code(oracle, released):
    sides = {"men": side_of(oracle, "men"), "ent": side_of(oracle, "ent", 4)}
    contrastive = transcribed_contrastive_loss(sides["ent"], sides["men"], exclude_self=False)
    loss = training_loss(transcribed_scores(released, sides["men"], sides["ent"]), contrastive)
    assert_near(contrastive, oracle["out.cl"])
    assert_near(loss, oracle["out.train_loss"])
    loss.backward()
    for side, features in sides.items():
        for theirs, ours in INPUTS.items():
            assert_near(getattr(features, ours).grad, oracle[f"gradin.{side}.{theirs}"])
    expected = {name.removeprefix("grad."): value for name, value in oracle.items() if name.startswith("grad.")}
    weights = {name.removeprefix("w."): value for name, value in oracle.items() if name.startswith("w.")}
    gradients = MatchingHead.from_released(weights | expected).state_dict()
    for name, parameter in released.named_parameters():
        assert_near(parameter.grad, gradients[name].double())


def test_csra_of_equal_tokens_doubles_them():
    token = torch.randn(2, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(csra(token.expand(2, 5, 3)), 2 * token[:, 0])


# The head, against the formulas.


def random_head(seed: int, sizes: tuple[int, int], direction: str = "unidirectional", **config: object) -> MatchingHead:
    """In fp64, every weight random, biases and LayerNorms too; ``sizes`` are dt and d."""
    torch.manual_seed(seed)
    clip = {"projection_dim": sizes[0], "text_config": {"hidden_size": sizes[0], "num_attention_heads": 1}}
    head = MatchingHead(
        ClipNDConfig(clip, head="matching", matching_dim=sizes[1], matching_direction=direction, **config)
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape))
    return head.double()


def random_side(rows: int, tokens: int, patches: int, sizes: tuple[int, int], share: float = 1.0) -> Features:
    """Texts of 1 to ``tokens`` tokens; a ``share`` of the rows has text, and of the rows has pictures."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    return Features(
        text_cls=normal(rows, sizes[0]),
        text_tokens=normal(rows, tokens, sizes[0]),
        text_mask=torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1)),
        image_cls=normal(rows, sizes[1]),
        image_tokens=normal(rows, patches, sizes[1]),
        has_text=torch.rand(rows) < share,
        has_image=torch.rand(rows) < share,
    )


def gradients(value: Tensor, head: MatchingHead, *sides: Features) -> dict[str, Tensor]:
    """Of every weight and every input."""
    named = dict(head.named_parameters())
    for number, side in enumerate(sides):
        named |= {f"{number}.{name}": getattr(side, name) for name in INPUTS.values()}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value[value.isfinite()].abs().max().item() if value.isfinite().any() else 1.0)
        torch.testing.assert_close(
            found[name].to(value.dtype), value, rtol=0, atol=1e-9 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def everything(scores: MatchingScores) -> dict[str, Tensor]:
    return {"total": scores.total} | scores.branches


rows = st.integers(1, 4)
widths = st.tuples(st.integers(2, 6), st.integers(2, 6))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("block", [None, 1], ids=["whole", "blocks"])
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.tuples(rows, rows), st.tuples(rows, rows), rows, widths, st.sampled_from(ATTEND))
def test_scores_and_gradients_are_the_formulas(
    direction, mask_padding, block, seed, counts, tokens, patches, sizes, attend
):
    """Padding of any length, any mix of what is present; in the smallest blocks as in one."""
    with pytest.MonkeyPatch.context() as patch:
        if block is not None:
            patch.setattr(matching_clipnd, "MENTION_BLOCK", block)
            patch.setattr(matching_clipnd, "BLOCK_BYTES", block)
            patch.setattr(attention_clipnd, "CPU_BLOCK_BYTES", block)
        check_scores_and_gradients(direction, mask_padding, seed, counts, tokens, patches, sizes, attend)


def check_scores_and_gradients(direction, mask_padding, seed, counts, tokens, patches, sizes, attend) -> None:
    head = random_head(seed, sizes, direction, mask_padding=mask_padding)
    m, e = (random_side(count, length, patches, sizes, 0.7) for count, length in zip(counts, tokens, strict=True))
    found = head(m, e)
    expected = transcribed_scores(
        head, m, e, bidirectional=direction == "bidirectional", mask_padding=mask_padding, attend=attend
    )
    assert sorted(expected.branches) == sorted(BRANCHES[direction])
    assert_equal(everything(found), everything(expected))
    weights = torch.randn(1 + len(expected.branches), *expected.total.shape, dtype=torch.float64)

    def drawn(scores: MatchingScores) -> Tensor:
        each = torch.stack([everything(scores)[name].double() for name in everything(expected)])
        return (weights * each.masked_fill(each == -torch.inf, 0)).sum()

    assert_equal(gradients(drawn(found), head, m, e), gradients(drawn(expected), head, m, e))


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.tuples(rows, rows), rows, widths)
def test_a_pair_transcribed_alone_scores_as_among_others(direction, seed, tokens, patches, sizes):
    """So what the formulas' own masks leave out is left out pair by pair."""
    head = random_head(seed, sizes, direction)
    m, e = (random_side(3, length, patches, sizes, 0.6) for length in tokens)
    bidirectional = direction == "bidirectional"
    together = everything(transcribed_scores(head, m, e, bidirectional=bidirectional))
    for b, n in np.ndindex(3, 3):
        pair = [only(side, row) for side, row in ((m, b), (e, n))]
        alone = everything(transcribed_scores(head, *pair, bidirectional=bidirectional))
        assert_equal(alone, {name: value[b : b + 1, n : n + 1] for name, value in together.items()})


def only(side: Features, row: int) -> Features:
    """One row, its padding cut off."""
    values = {field.name: getattr(side, field.name) for field in fields(side)}
    side = Features(**{name: None if value is None else value[row : row + 1] for name, value in values.items()})
    length = int(side.text_mask.sum())
    return replace(side, text_tokens=side.text_tokens[:, :length], text_mask=side.text_mask[:, :length])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("self_term", ["exclude", "zero"])
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 5), widths)
def test_the_training_loss_and_its_gradients_are_the_formulas(direction, self_term, seed, batch, sizes):
    head = random_head(seed, sizes, direction, contrastive_self=self_term)
    m, e = (random_side(batch, 4, 3, sizes) for _ in range(2))
    found = training_loss(head(m, e), head.contrastive_loss(e, m))
    scores = transcribed_scores(head, m, e, bidirectional=direction == "bidirectional")
    expected = training_loss(scores, transcribed_contrastive_loss(e, m, exclude_self=self_term == "exclude"))
    assert_equal({"loss": found}, {"loss": expected})
    assert_equal(gradients(found, head, m, e), gradients(expected, head, m, e))
