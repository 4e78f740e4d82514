"""What entities take in memory: encoded and kept, while they are encoded, and while mentions are scored against them.

    python benchmarks/memory.py [--entities 1000 2000 4000] [--mentions 20] [--direction bidirectional]

Baselines: what the released code of the matching network keeps of an entity (all its tokens, in fp32: 103,552 bytes),
and in the same run the transcribed formulas' peaks, which grow with the pairs. Each peak is resident memory beyond what
was there before, in a process of its own; of scoring, the result itself is named beside it: it must grow.
"""

from __future__ import annotations

import argparse

import torch
from scoring import DIM, PATCHES, TEXT, TOKENS, World, arguments, encode, extra_peak, fresh_model, in_process

from m3el_hf.modeling.encoded_clipnd import MatchingEntities

RELEASED = 4 * (TEXT + TOKENS * TEXT + DIM + PATCHES * DIM)
"""Bytes that the released code keeps of an entity: both vectors and all tokens, in fp32."""


def main() -> None:
    """Prints every figure with its baseline."""
    options = arguments()
    options.add_argument("--mentions", type=int, default=20)
    options.add_argument("--entities", type=int, nargs="*", default=[1000, 2000, 4000])
    options.add_argument("--peak-of-encoding", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of_encoding is not None:
        print(peak_of_encoding(given.direction, given.peak_of_encoding))
        return
    show_bytes(given.direction)
    direction = ["--direction", given.direction]
    for entities in given.entities:
        peak = in_process("memory.py", "--peak-of-encoding", entities, *direction)
        kept = entities * encoded(given.direction, 1).bytes_per_row
        print(
            f"encoding {entities:6} entities: {peak / 1e6:8.1f} MB more at the peak, {kept / 1e6:.1f} MB of them kept"
        )
    results = 3 + (given.direction == "bidirectional") + 2  # the branches, CLIP's cosine and the total
    peaks = {}
    for entities in given.entities:
        sizes = ["--mentions", given.mentions, "--entities", entities, *direction]
        peak, slow = (in_process("scoring.py", "--peak", run, *sizes) for run in ("score", "einsum"))
        result = 4 * results * given.mentions * entities
        peaks[entities] = peak - result
        print(
            f"scoring {given.mentions} mentions x {entities:6} entities: {peak / 1e6:8.1f} MB more at the peak, "
            f"{result / 1e6:.1f} MB of them the result; the transcription {slow / 1e6:.1f} MB"
        )
    few, many = min(peaks), max(peaks)
    if few < many:
        growth = (peaks[many] - peaks[few]) / (many - few)
        print(f"  from {few} to {many} entities, {growth:.0f} bytes more an entity, the result aside")


def show_bytes(direction: str) -> None:
    entities = encoded(direction, 10)
    print(f"{direction}: bytes an encoded entity takes; the released code keeps {RELEASED}")
    for name, kept in (("fp32", entities), ("fp16", entities.to(dtype=torch.float16))):
        print(f"  {name}: {kept.bytes_per_row:7}  {RELEASED / kept.bytes_per_row:.2f} times fewer")
        parts = {part: value[:1].nbytes for part, value in kept.tensors().items()}
        print("    " + ", ".join(f"{part} {size}" for part, size in sorted(parts.items(), key=lambda one: -one[1])))


def encoded(direction: str, entities: int) -> MatchingEntities:
    return encode(fresh_model(direction), *World().drawn(1, entities))[1]


def peak_of_encoding(direction: str, entities: int) -> int:
    """Extra peak memory of what the head does to features, after a small run that loads what any run needs."""
    world, model = World(), fresh_model(direction)
    for rows in (3, entities):
        features = world.side(world.latents(rows))
        peak = extra_peak(lambda features=features: model.matching.entities(features))
    return peak


if __name__ == "__main__":
    main()
