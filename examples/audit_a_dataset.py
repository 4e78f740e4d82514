"""Builds a dataset folder, prints what an audit finds in it, and reads a topic as a task sees it.

python examples/audit_a_dataset.py [RELEASE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from m3el_hf import load_m3el
from m3el_hf.data.audit import audit
from m3el_hf.data.store import build


def main(release: str | None = None) -> None:
    with TemporaryDirectory() as folder:
        built = Path(folder) / "m3el"
        if release is None:
            manifest = build("mini", None, built, instances=300)
        else:
            manifest = build("m3el", Path(release), built)
        for finding in audit(built).findings:
            print(f"- {finding.text}")
        topic = next(iter(manifest.rows))
        rows = load_m3el(topic, task="t2t", data_dir=built, split="train")
        print(f"{topic}, t2t: {rows.num_rows} rows of {', '.join(rows.column_names)}")
        row = rows[0]
        print(f"{row['mention']}: {row['context']} -> {row['candidate_descriptions'][row['answer']]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
