"""Gradient caching: the gradient of the whole batch, in the memory of a part of it."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from datasets import DatasetDict

from m3el_hf.data.collator import LinkingCollator, undecoded
from m3el_hf.training.arguments import TrainingArguments
from m3el_hf.training.batches import TrainingCollator
from m3el_hf.training.lora import add_lora
from m3el_hf.training.objective import Objective, TrainingBatch, _split, backward
from tests.training.jobs import job, start

ROWS = 7


@pytest.fixture(scope="module")
def batch(processor, data: DatasetDict, tmp_path_factory) -> TrainingBatch:
    settings = TrainingArguments(tmp_path_factory.mktemp("run"), tasks_per_mention=2)
    return TrainingCollator(LinkingCollator(processor), settings, 0)(list(undecoded(data["train"].select(range(ROWS)))))


def objective(head: str, dropout: float = 0.0, lora: bool = False, **model) -> Objective:
    built, _ = start(job("", "", head=head, model={"dropout": dropout, **model}))
    if lora:
        add_lora(built, rank=4, dropout=dropout)
        torch.manual_seed(1)
        for name, weight in built.named_parameters():  # adapters start at zero, and their other half without gradient
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return Objective(built).train()


def gradients(module: Objective) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in module.named_parameters() if one.requires_grad and one.grad is not None}


def together(module: Objective, batch: TrainingBatch, parts: int) -> dict[str, torch.Tensor]:
    """Parts encoded one after another, as dropout wants to be compared, in one graph."""
    torch.manual_seed(7)
    seen = batch.views[:, 2:].any(0)
    hidden = {name: batch.entities[name] & seen[i] for i, name in enumerate(("has_text", "has_image"))}
    sides = [batch.mentions, {**batch.entities, **hidden}]
    encoded = [module(*pieces) for pieces in zip(*(_split(side, parts) for side in sides), strict=True)]
    terms = module([one["mentions"] for one in encoded], [one["entities"] for one in encoded], batch)
    terms["backward"].backward()
    return gradients(module)


@pytest.mark.parametrize("parts", [2, 3, ROWS + 2])
@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("clip", {}),
        ("pooled", {"dropout": 0.3}),
        ("matching", {"dropout": 0.3}),
        ("matching", {"dropout": 0.3, "lora": True, "matching_direction": "bidirectional"}),
    ],
)
def test_parts_have_the_gradient_of_the_whole(head, options, parts, batch):
    wanted = together(objective(head, **options), batch, parts)
    module = objective(head, **options)
    torch.manual_seed(7)
    after = torch.rand(1), torch.manual_seed(7)
    backward(module, batch, parts, Accelerator(cpu=True))
    found = gradients(module)
    assert wanted.keys() <= found.keys() and after is not None
    for name, gradient in wanted.items():
        bound = 1e-5 * max(1e-2, gradient.abs().max().item())
        assert (gradient - found[name]).abs().max() <= bound, name
    assert not any(found[name].any() for name in found.keys() - wanted.keys())
    if not options.get("dropout"):  # then it is also that of one part
        plain = objective(head, **options)
        backward(plain, batch, 1, Accelerator(cpu=True))
        for name, gradient in gradients(plain).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-7)


class Kept:
    """What the graph keeps, in bytes: now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Counted:
        return Counted(tensor, self)


class Counted:
    def __init__(self, tensor: torch.Tensor, kept: Kept) -> None:
        self.tensor, self.kept = tensor, kept
        kept.now += tensor.nbytes
        kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.now -= self.tensor.nbytes


def test_parts_keep_less_for_the_backward_pass(processor, data, tmp_path):
    rows = list(undecoded(data["train"].select(range(24))))
    collator = TrainingCollator(LinkingCollator(processor), TrainingArguments(tmp_path), 0)
    batch, most = collator(rows), {}
    for parts in (1, 4):
        kept, module = Kept(), objective("clip")
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda one: one.tensor):
            backward(module, batch, parts, Accelerator(cpu=True))
        most[parts] = kept.most
    print(f"kept for the backward pass: {most[1] / 1e6:.1f} MB in one part, {most[4] / 1e6:.1f} MB in four")
    assert most[4] < 0.4 * most[1]


def test_rows_that_fit_no_task_have_no_loss(batch):
    empty = TrainingBatch(**{**vars(batch), "rows": batch.rows[:0], "views": batch.views[:0]})
    module = objective("matching")
    terms = backward(module, empty, 1, Accelerator(cpu=True))
    assert terms["loss/total"] == 0
    assert all(one.isfinite().all() for one in gradients(module).values())
