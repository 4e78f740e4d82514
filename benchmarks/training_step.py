"""What a training step of the matching head costs, forward and backward, beside the formulas transcribed.

    python benchmarks/training_step.py [--batch 64] [--direction bidirectional] [--device cuda]

A step scores every mention of the batch against every entity of it and takes the training loss back to each weight
and each feature, as the encoder below needs. Baselines, in the same run on the same features: `transcription.py` with
einsum and with broadcast matrix products. Repetitions alternate and the best of each counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from scoring import FORMS, INPUTS, World, arguments, difference, in_turns, show_times, trained_model, transcription
from torch import Tensor
from transcription import training_loss, transcribed_contrastive_loss

from m3el_hf.modeling.matching_clipnd import Features, MatchingHead

OURS = "MatchingHead"


def main() -> None:
    """Prints every figure with its baseline."""
    parser = arguments()
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.direction}, batch {options.batch}, forward and backward, {options.threads} thread(s)")
    steps = make_steps(options.direction, options.batch, options.device, options.shortest)
    seconds, gradients = in_turns(steps, options.repeats, options.device)
    show_times(seconds)
    for form in FORMS:
        largest = difference(gradients[OURS], gradients[form])
        print(f"  largest difference from a gradient of {form}: {largest:.1e} of the gradient's largest value")


def make_steps(direction: str, batch: int, device: str, shortest: int) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The step of the head and of each transcription, each giving the gradient of every weight and feature."""
    world = World(device, shortest)
    head = trained_model(direction, world).matching.requires_grad_()
    latents = world.latents(batch)
    sides = world.side(latents), world.side(latents)
    for side in sides:
        for name in INPUTS:
            getattr(side, name).requires_grad_()
    steps = {OURS: partial(head_step, head, *sides)}
    return steps | {name: partial(transcribed_step, head, *sides, direction, name) for name in FORMS}


def head_step(head: MatchingHead, mentions: Features, entities: Features) -> dict[str, Tensor]:
    loss = training_loss(head(mentions, entities), head.contrastive_loss(entities, mentions))
    return gradients_of(loss, head, mentions, entities)


def transcribed_step(
    head: MatchingHead, mentions: Features, entities: Features, direction: str, form: str
) -> dict[str, Tensor]:
    scores = transcription(head, mentions, entities, direction, form)
    return gradients_of(
        training_loss(scores, transcribed_contrastive_loss(entities, mentions)), head, mentions, entities
    )


def gradients_of(loss: Tensor, head: MatchingHead, *sides: Features) -> dict[str, Tensor]:
    # A key's bias adds the same to every logit of a softmax: its gradient is 0, and what is computed is noise.
    named = {name: weight for name, weight in head.named_parameters() if not name.endswith("fc_key.bias")}
    for number, side in enumerate(sides):
        named |= {f"{number}.{name}": getattr(side, name) for name in INPUTS}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


if __name__ == "__main__":
    main()
