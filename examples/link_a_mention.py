"""Links a mention to the entities of a built dataset, with a model that `m3el-hf quickstart` saved.

python examples/link_a_mention.py runs/quickstart/model runs/quickstart/data "a crimson star on stripes"
"""

from __future__ import annotations

import sys

from m3el_hf import EntityLinker


def main(model: str, knowledge_base: str, context: str) -> None:
    linker = EntityLinker.from_pretrained(model, knowledge_base=knowledge_base)
    for link in linker(context=context, top_k=5):
        print(f"{link.score:8.2f}  {link.name}: {link.description}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
