"""How fast, in how much memory and how exactly mentions are scored against entities, beside the formulas transcribed.

    python benchmarks/scoring.py [--mentions 20] [--entities 1000] [--direction bidirectional] [--device cuda]

Features are drawn at the sizes of CLIP ViT-B/32: texts of up to 40 tokens, 512 wide, and 50 patches brought to 96. An
entity's text and picture, and its mentions', share what the entity is, and the head is trained on them for some steps,
so that scores spread as a trained head's do. Baselines, measured in the same run on the same features:
`transcription.py` with einsum, its faster form, and with broadcast matrix products, as such code is often written.
Entities and mentions are encoded before, as a knowledge base is; what that costs is a line of its own. Repetitions
alternate and the best of each counts, as other work on the machine comes and goes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transcription import attend_einsum, attend_matmul, training_loss, transcribed_scores

from m3el_hf import ClipNDConfig, ClipNDModel
from m3el_hf.modeling.encoded_clipnd import MatchingEntities, MatchingMentions
from m3el_hf.modeling.matching_clipnd import Features, MatchingHead, MatchingScores

TEXT, DIM, TOKENS, PATCHES, LATENT = 512, 96, 40, 50, 48
NOISE = 0.9
"""In units of what an entity is: a trained head ranks about 85 % of the mentions' entities first among 1,000."""
WIKIMEL = (5169, 109_976)
"""Test mentions and entities of WikiMEL; scoring them took the released code 9 min 34 s on a GPU (arXiv 2412.10440)."""
INPUTS = ("text_cls", "text_tokens", "image_cls", "image_tokens")
FORMS = {"einsum": attend_einsum, "matmul": attend_matmul}
OURS = "model.score, both sides encoded"


def main() -> None:
    """Prints every figure with its baseline."""
    options = arguments()
    options.add_argument("--mentions", type=int, default=20)
    options.add_argument("--entities", type=int, default=1000)
    options.add_argument("--base", type=int, nargs=2, default=(100, 10_000), help="mentions and entities for caches")
    options.add_argument("--peak", choices=("score", *FORMS), help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak_of(given.peak, given.direction, given.mentions, given.entities))
        return
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no accelerator here: nothing measured")
        return
    print(f"{given.direction}, {given.mentions} mentions x {given.entities} entities, {given.threads} thread(s)")
    world = World(given.device, given.shortest)
    model = trained_model(given.direction, world)
    show_speed(model, world, given)
    if given.device == "cpu":
        show_memory(given)
    show_caches(model, world, *given.base)
    if given.device != "cpu":
        score_all(model, world, *WIKIMEL)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.splitlines()[0])
    parser.add_argument("--direction", choices=("unidirectional", "bidirectional"), default="unidirectional")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each, in turns")
    parser.add_argument("--shortest", type=int, default=TOKENS, help="tokens of the shortest text; 40 pads nothing")
    return parser


# What is scored.


class World:
    """Entities and mentions of them, as features of the matching head's sizes.

    Every feature is a linear image of what the entity is, a latent vector, plus noise; tokens have noise of their own.

    Args:
        device: Where features are drawn.
        shortest: Tokens of the shortest text; the longest has `TOKENS`.
    """

    def __init__(self, device: str = "cpu", shortest: int = TOKENS) -> None:
        self.device, self.shortest = device, shortest
        self.generator = torch.Generator(device).manual_seed(0)
        self._to_text, self._to_image = self._map(TEXT), self._map(DIM)
        self._to_text_tokens, self._to_image_tokens = self._map(TEXT, 4), self._map(DIM, 4)

    def latents(self, rows: int) -> Tensor:
        """What each of new entities is: ``[rows, LATENT]``."""
        return self._normal(rows, LATENT)

    def side(self, latents: Tensor) -> Features:
        """Draws a text and a picture of each row of ``latents`` ``[n, LATENT]``."""
        rows = len(latents)
        lengths = torch.randint(self.shortest, TOKENS + 1, (rows, 1), generator=self.generator, device=self.device)
        present = torch.ones(rows, dtype=torch.bool, device=self.device)
        return Features(
            text_cls=F.normalize(self._seen(latents) @ self._to_text, dim=-1),
            text_tokens=self._tokens(latents, self._to_text_tokens, TOKENS),
            text_mask=torch.arange(TOKENS, device=self.device) < lengths,
            image_cls=self._seen(latents) @ self._to_image,
            image_tokens=self._tokens(latents, self._to_image_tokens, PATCHES),
            has_text=present,
            has_image=present,
        )

    def drawn(self, mentions: int, entities: int) -> tuple[Features, Features]:
        """Entities, and mentions of some of them."""
        latents = self.latents(entities)
        gold = torch.randint(entities, (mentions,), generator=self.generator, device=self.device)
        return self.side(latents[gold]), self.side(latents)

    def _map(self, width: int, kinds: int = 0) -> Tensor:
        return self._normal(*([kinds] if kinds else []), LATENT, width) / LATENT**0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _seen(self, latents: Tensor) -> Tensor:
        return latents + NOISE * self._normal(*latents.shape)

    def _tokens(self, latents: Tensor, maps: Tensor, count: int) -> Tensor:
        kinds = torch.randint(len(maps), (count,), generator=self.generator, device=self.device)
        shared = torch.einsum("nk,mkw->nmw", self._seen(latents), maps)[:, kinds]
        return shared + NOISE * self._normal(*shared.shape)


def fresh_model(direction: str, device: str = "cpu") -> ClipNDModel:
    """A model with a matching head of full size, and towers as small as can be: they are not run."""
    torch.manual_seed(0)
    text = {"hidden_size": TEXT, "num_hidden_layers": 1, "intermediate_size": 8}
    text |= {"vocab_size": 10, "bos_token_id": 8, "eos_token_id": 9, "pad_token_id": 9}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 1}
    clip = {"projection_dim": TEXT, "text_config": text, "vision_config": vision}
    config = ClipNDConfig(clip, head="matching", matching_dim=DIM, matching_direction=direction)
    return ClipNDModel(config).eval().requires_grad_(False).to(device)


def trained_model(direction: str, world: World, steps: int = 40, batch: int = 48) -> ClipNDModel:
    """A model whose head has learnt to tell this world's entities apart, for ``steps`` steps."""
    model = fresh_model(direction, world.device)
    head = model.matching.requires_grad_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(steps):
        latents = world.latents(batch)
        mentions, entities = world.side(latents), world.side(latents)
        loss = training_loss(head(mentions, entities), head.contrastive_loss(entities, mentions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.requires_grad_(False)
    return model


def encode(model: ClipNDModel, mentions: Features, entities: Features) -> tuple[MatchingMentions, MatchingEntities]:
    """What the model keeps of either side; for CLIP's unit picture vector, of no effect here, stands the text's."""
    sides = model.matching.mentions(mentions), model.matching.entities(entities)
    return replace(sides[0], image=mentions.text_cls), replace(sides[1], image=entities.text_cls)


def transcription(
    head: MatchingHead, mentions: Features, entities: Features, direction: str, form: str
) -> MatchingScores:
    bidirectional = direction == "bidirectional"
    return transcribed_scores(head, mentions, entities, bidirectional=bidirectional, attend=FORMS[form])


# Measuring.


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> tuple[dict[str, float], dict[str, Any]]:
    """The least seconds of each run, and what it returned; the runs alternate."""
    seconds, results = {name: float("inf") for name in runs}, {}
    for _ in range(repeats):
        for name, run in runs.items():
            results.pop(name, None)
            synchronize(device)
            start = time.perf_counter()
            results[name] = run()
            synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds, results


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def show_times(seconds: dict[str, float]) -> None:
    """Each run's seconds, and how many times as fast as each transcription it is."""
    for name, best in seconds.items():
        ratios = [f"{seconds[form] / best:6.2f} times as fast as {form}" for form in FORMS]
        print(f"  {name:36}{best:8.3f} s {', '.join(ratios) if name not in FORMS else '  transcription'}")


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value."""
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)).item()
        for name, value in expected.items()
    )


def extra_peak(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that a run takes beyond what was there before; call it in a process of its own."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    result = run()  # kept until the peak is read
    peak = memory("VmHWM") - before
    del result
    return peak


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_process(script: str, *arguments: object) -> int:
    """Runs a script of this folder that prints a number, where freed memory goes back to the system at once."""
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


# The figures.


def show_speed(model: ClipNDModel, world: World, options: argparse.Namespace) -> None:
    head = model.matching
    mentions, entities = world.drawn(options.mentions, options.entities)
    encoded = encode(model, mentions, entities)
    runs: dict[str, Callable[[], MatchingScores]] = {
        OURS: lambda: model.score(*encoded),
        "mentions and entities encoded too": lambda: model.score(*encode(model, mentions, entities)),
    }
    for form in FORMS:
        runs[form] = lambda form=form: transcription(head, mentions, entities, options.direction, form)
    seconds, results = in_turns(runs, options.repeats, options.device)
    show_times(seconds)
    found, expected = results[OURS], results["einsum"]
    largest = max((found.branches[name] - branch).abs().max().item() for name, branch in expected.branches.items())
    print(
        f"  largest difference from einsum: {(found.total - expected.total).abs().max():.1e} of a total, {largest:.1e} "
        f"of a branch; the largest total is {expected.total.abs().max():.1f}"
    )


def show_memory(options: argparse.Namespace) -> None:
    sizes = ["--direction", options.direction, "--mentions", options.mentions, "--entities", options.entities]
    peaks = {run: in_process("scoring.py", "--peak", run, *sizes) for run in ("score", *FORMS)}
    for name, peak in peaks.items():
        share = ", ".join(f"1/{peaks[form] / peaks['score']:.0f} of {form}'s" for form in FORMS)
        print(f"  extra peak memory, {name:6} {peak / 1e6:8.1f} MB {share if name == 'score' else ''}")


def peak_of(run: str, direction: str, mentions: int, entities: int) -> int:
    """Extra peak memory of scoring, after a small run that loads what any run needs."""
    world, model = World(), fresh_model(direction)
    for sizes in ((2, 3), (mentions, entities)):
        sides = world.drawn(*sizes)
        if run == "score":
            encoded = encode(model, *sides)
            del sides
            peak = extra_peak(lambda encoded=encoded: model.score(*encoded))
        else:
            peak = extra_peak(lambda sides=sides: transcription(model.matching, *sides, direction, run))
    return peak


def show_caches(model: ClipNDModel, world: World, mentions: int, entities: int) -> None:
    """What the fp16 cache changes, and how few entities the bound leaves to be scored exactly; timed once each."""
    print(f"caches and bound, {mentions} mentions x {entities} entities")
    one, base = encoded_base(model, world, mentions, entities)
    start = time.perf_counter()
    exact = model.score(one, base).total
    seconds = time.perf_counter() - start
    half = base.to(dtype=torch.float16)
    rounded = model.score(one, half).total
    same = {k: share(top(exact, k), top(rounded, k)) for k in (1, 10)}
    print(f"  an encoded entity takes {half.bytes_per_row} bytes in fp16, {base.bytes_per_row} in fp32")
    print(
        f"  with the fp16 cache {same[1]:.1%} of the mentions keep their top 1, {same[10]:.1%} their top-10 set; "
        f"largest difference {(rounded - exact).abs().max():.1e} of {exact.abs().max():.1f}"
    )
    for k in (1, 10):
        for name, cache, reference in (("fp32", base, exact), ("fp16", half, rounded)):
            start = time.perf_counter()
            found, survived = certified(model, one, cache, k)
            ratio = seconds / (time.perf_counter() - start)
            print(
                f"  certified top {k:2}, {name}: {share(found, top(reference, k)):.1%} of the sets are the exact ones, "
                f"{survived:.2%} of the entities scored exactly, {ratio:.1f} times as fast as scoring all"
            )


def encoded_base(
    model: ClipNDModel, world: World, mentions: int, entities: int, dtype: torch.dtype | None = None
) -> tuple[MatchingMentions, MatchingEntities]:
    """Entities, kept as ``dtype``, and mentions of some of them, drawn and encoded 1,000 entities at a time."""
    share = -(-mentions * 1000 // entities)  # of the mentions, for each 1,000 entities
    parts = []
    for start in range(0, entities, 1000):
        one, base = encode(model, *world.drawn(share, min(1000, entities - start)))
        parts.append((one, base.to(dtype=dtype)))
    one, base = map(joined, zip(*parts, strict=True))
    return one[:mentions], base


def joined(parts: Sequence[Any]) -> Any:
    names = parts[0].tensors()
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def certified(
    model: ClipNDModel, mentions: MatchingMentions, entities: MatchingEntities, k: int
) -> tuple[Tensor, float]:
    """The exact top k ``[B, k]`` of each mention, and the share of pairs that had to be scored exactly.

    No entity scores above factorised + bound. The k-th best exact score among those first by that sum is a floor: who
    cannot reach it is out.
    """
    factorised, bound = model.score_factorised(mentions, entities)
    highest = factorised + bound
    found, scored = [], 0
    for row, most in enumerate(highest):
        one, first = mentions[row : row + 1], most.topk(4 * k).indices
        floor = model.score(one, entities[first]).total[0].topk(k).values[-1]
        rest = (most >= floor).nonzero().flatten()
        found.append(rest[model.score(one, entities[rest]).total[0].topk(k).indices])
        scored += len(torch.cat([first, rest]).unique())
    return torch.stack(found), scored / highest.numel()


def top(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).indices


def share(found: Tensor, expected: Tensor) -> float:
    """Of rows with the same set of indices."""
    return (found.sort().values == expected.sort().values).all(1).float().mean().item()


def score_all(model: ClipNDModel, world: World, mentions: int, entities: int, size: int = 512) -> None:
    """Every mention against every entity of an fp16 cache, keeping the top 20 of each."""
    one, base = encoded_base(model, world, mentions, entities, torch.float16)
    for attempt in ("first time", "again"):
        synchronize(world.device)
        start = time.perf_counter()
        for rows in torch.arange(mentions, device=world.device).split(size):
            model.score(one[rows], base).total.topk(20)
        synchronize(world.device)
        seconds = time.perf_counter() - start
        print(
            f"  {mentions} x {entities} pairs, {attempt}: {seconds:.1f} s, {mentions * entities / seconds:.3g} pairs/s"
        )


if __name__ == "__main__":
    main()
