"""The report of an evaluation or an experiment: a page, and the same figures for cards, papers, machines, terminals."""

from __future__ import annotations

from m3el_hf.evaluation.report.document import (
    Candidate,
    Column,
    DataTable,
    Estimate,
    Example,
    Report,
    Setting,
    Value,
    software,
)

__all__ = ["Candidate", "Column", "DataTable", "Estimate", "Example", "Report", "Setting", "Value", "software"]
