"""Looks at a built folder as one who is about to use it should: what is missing, leaked, doubled, broken."""

from __future__ import annotations

import json
from pathlib import Path

from m3el_hf.data.audit.cases import Cases
from m3el_hf.data.audit.charts import charts
from m3el_hf.data.audit.contents import content_sections, listings
from m3el_hf.data.audit.facts import row_sections
from m3el_hf.data.audit.findings import findings
from m3el_hf.data.audit.measures import Measures
from m3el_hf.data.audit.report import FOLDER, Audit
from m3el_hf.data.audit.scan import Scan
from m3el_hf.data.audit.tally import Tally
from m3el_hf.data.manifest import Manifest

__all__ = ["Audit", "audit", "is_audited"]


def audit(folder: Path, *, progress: bool = True) -> Audit:
    """Audits a built folder; the same folder gives the same audit.

    It is read once, a row group at a time, and each distinct picture is decoded once. Memory grows by some hundred
    bytes a row and a picture.

    Args:
        folder: What `m3el-hf data build` wrote.
        progress: Show a progress bar.

    Raises:
        M3ELError: If it is no built folder, or cannot be read.
    """
    scan = Scan(folder, progress)
    measures = Measures(scan)
    tally = Tally(measures)
    sections = [*row_sections(tally), *content_sections(tally)]
    found, clean = findings([fact for section in sections for fact in section.facts], scan.manifest)
    cases = Cases(measures)
    return Audit(
        title=scan.manifest.title,
        revision=scan.manifest.revision,
        settings=_settings(scan.manifest),
        findings=found,
        clean=clean,
        sections=sections,
        listings=listings(scan),
        charts=charts(measures),
        galleries=cases.galleries(),
        thumbnails=cases.thumbnails,
    )


def is_audited(folder: Path) -> bool:
    """Whether a built folder holds an audit of just the data that it holds.

    Raises:
        M3ELError: If it is no built folder.
    """
    revision = Manifest.load(folder).revision
    try:
        saved = json.loads((folder / FOLDER / "audit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none that can be read: it takes a new one
        return False
    return isinstance(saved, dict) and saved.get("revision") == revision


def _settings(manifest: Manifest) -> dict[str, str]:
    """How the data was built, in words."""
    candidates = {"candidates": "each mention has its own", "knowledge_base": "every entity of the knowledge base"}
    side = "originals" if manifest.short_side is None else f"short side at most {manifest.short_side} pixels"
    return {
        "source": manifest.source or "generated",
        "reader": manifest.reader,
        "candidates": candidates[manifest.kind],
        "protocol": manifest.protocol,
        "splits": "the source's own" if manifest.released_splits else "by group, made here where the source has none",
        "seed": str(manifest.seed),
        "pictures": side,
    }
