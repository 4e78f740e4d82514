"""The release format of M³EL (arXiv 2410.18096), re-released as DiffMEL with a `difficulty` field.

A folder of ``<topic>.json`` or ``<topic>_<split>.json`` files, each JSON, JSON lines or Python literals, beside
``<topic>_candidates_images/`` folders. The release gives no ids, and a mention's own name is the gold's.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3el_hf.data.schema import SPLITS, Candidate, Picture, Record, Report
from m3el_hf.errors import M3ELError
from m3el_hf.tasks import TOPICS

_FILE_NAME = re.compile(rf"({'|'.join(TOPICS)})(?:_({'|'.join(SPLITS)}))?\.json")


class _UnusableRowError(ValueError):
    """Why one instance cannot be used."""


def read_m3el(folder: Path | None, report: Report) -> Iterator[Record]:
    """Yields the instances of a release folder, in the order of file name and row.

    An instance that cannot be used (no gold, gold not among its candidates, a field missing) is skipped and reported
    with its file, row and reason.

    Args:
        folder: The folder that holds the topic files.
        report: Counts what is read and lists what is skipped.

    Raises:
        M3ELError: If the folder does not exist, holds no topic file, or a file cannot be parsed at all.
    """
    if folder is None:
        raise M3ELError("no folder to read: pass the folder that holds the release's <topic>.json files")
    for path, topic, split in _topic_files(folder, report):
        for number, instance in _parse_file(path, report):
            report.read += 1
            source = f"{path.name} row {number}"
            try:
                yield _record(instance, folder, topic, split, f"{path.stem}-{{qid}}-{number}", source)
            except _UnusableRowError as reason:
                report.skipped.append(" ".join(f"{source}: {reason}".split()))  # a field may hold a line break


def _topic_files(folder: Path, report: Report) -> list[tuple[Path, str, str | None]]:
    if not folder.is_dir():
        raise M3ELError(f"no such folder: {folder}; pass the folder that holds the release's <topic>.json files")
    files = [
        (path, match[1], match[2]) for path in sorted(folder.iterdir()) if (match := _FILE_NAME.fullmatch(path.name))
    ]
    known = {path for path, _, _ in files}
    for path in sorted(folder.glob("*.json*")):
        if path not in known:
            report.counts[f"file {path.name} not read: its name is no <topic>.json or <topic>_<split>.json"] += 1
    if not files:
        raise M3ELError(
            f"{folder} holds no M3EL file: expected <topic>.json or <topic>_<split>.json with a topic of "
            f"{', '.join(TOPICS)} and a split of {', '.join(SPLITS)}"
        )
    return files


def _parse_file(path: Path, report: Report) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a file with their numbers: one JSON or Python list, or one JSON or Python object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise M3ELError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    except OSError as error:
        raise M3ELError(f"{path} cannot be read ({error.strerror or error})") from error
    try:
        whole = _parse(text)
    except ValueError as error:
        # By line feeds alone: a text may hold U+2028, at which splitlines would cut.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines or not lines[0][1].lstrip().startswith("{"):
            reason = f"{path} is neither JSON, JSON lines nor Python literals ({error}): mend it or fetch it again"
            raise M3ELError(reason) from error
        yield from _parse_lines(path, lines, report)
    else:
        yield from enumerate(whole if isinstance(whole, list) else [whole])


def _parse_lines(path: Path, lines: list[tuple[int, str]], report: Report) -> Iterator[tuple[int, Any]]:
    for row, (number, line) in enumerate(lines):
        try:
            instance = _parse(line)
        except ValueError as error:
            report.read += 1
            report.skipped.append(f"{path.name} row {row} (line {number}): cannot be parsed ({error})")
        else:
            yield row, instance


def _parse(text: str) -> Any:
    """Parses JSON, else a Python literal; raises ValueError with the JSON parser's reason if it is neither."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        # The published sample is a Python literal: single quotes, None.
        if error.msg.startswith("Extra data"):
            raise ValueError(str(error)) from error
        try:
            return ast.literal_eval(text.strip())
        except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            raise ValueError(str(error)) from error


def _record(instance: Any, folder: Path, topic: str, split: str | None, id_template: str, source: str) -> Record:
    if not isinstance(instance, dict):
        raise _UnusableRowError(f"is a {type(instance).__name__}, not an object")
    qid = _text(instance, "Qid")
    if qid is None:
        raise _UnusableRowError("has no gold (field Qid)")
    mention = _text(instance, "name")
    if mention is None:
        raise _UnusableRowError("has no mention name (field name)")
    candidates = _candidates(instance, folder)
    if qid not in {candidate.qid for candidate in candidates}:
        raise _UnusableRowError(f"its gold {qid} is not among its candidates")
    return Record(
        id=id_template.format(qid=qid),
        source=source,
        topic=topic,
        split=split,
        mention=mention,
        context=_text(instance, "sentence"),
        picture=_picture(instance.get("image"), folder),
        answer_qid=qid,
        candidates=candidates,
        difficulty=_text(instance, "difficulty"),
    )


def _candidates(instance: dict[str, Any], folder: Path) -> tuple[Candidate, ...]:
    items = instance.get("candidates")
    if not isinstance(items, list | tuple) or not items:
        raise _UnusableRowError("has no candidates")
    candidates = []
    for item in items:
        qid = _text(item, "Qid") if isinstance(item, dict) else None
        if qid is None:
            raise _UnusableRowError("has a candidate without a Qid")
        candidates.append(
            Candidate(qid, _text(item, "name") or "", _text(item, "description"), _picture(item.get("image"), folder))
        )
    if len({candidate.qid for candidate in candidates}) < len(candidates):
        raise _UnusableRowError("lists a candidate twice")
    return tuple(candidates)


def _text(fields: dict[str, Any], key: str) -> str | None:
    """The field as stripped text; None where it is absent, empty or null."""
    value = fields.get(key)
    return _unicode(str(value), f"field {key}").strip() or None if value is not None else None


def _unicode(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character, which no Parquet file holds
        raise _UnusableRowError(f"has text that is not Unicode ({what})") from error
    return text


def _picture(value: Any, folder: Path) -> Picture | None:
    """Turns ``[file name, url, /ROOT/path]`` into a picture; None where all of it is empty."""
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise _UnusableRowError(f"has an image that is a {type(value).__name__}, not [file name, url, path]")
    file, url, location = (_unicode(str(part), "field image") if part else None for part in [*value, *[None] * 3][:3])
    if location is None:
        return Picture(path=Path(file) if file else None, url=url, flaw="has no path") if file or url else None
    path = folder.joinpath(*Path(location.lstrip("/")).parts[1:])  # the root, /M3EL/ or /DiffMEL/, is the folder
    return Picture(path=path, url=url, flaw=_path_flaw(path, folder))


def _path_flaw(path: Path, folder: Path) -> str | None:
    """Why a path is not to be opened, or None: one that climbs out points at nothing of the release."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except ValueError:  # a null character
        return "has an impossible path"
    return None if inside else f"lies outside {folder}"
