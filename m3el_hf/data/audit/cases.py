"""The worst cases of a dataset, to look at: which rows to show, read again, with small copies of their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3el_hf.data.audit.measures import Measures, mix, several
from m3el_hf.data.audit.report import Case, Gallery, Shown
from m3el_hf.data.audit.scan import Digests, Row, digest, excerpt
from m3el_hf.data.perceptual import NEAR_SAME
from m3el_hf.modeling.decoding_clipnd import UnusableImageError, decode_image

THUMBNAIL_SIDE = 160

PAIRS_SHOWN = 12
SHARED_SHOWN = 6
OTHERS_SHOWN = 6


class Cases:
    """Picks the cases of one scan and reads them again.

    Attributes:
        thumbnails: JPEGs in base64, by key; grows while galleries are made.
    """

    def __init__(self, measures: Measures) -> None:
        self._m = measures
        self._scan = measures.scan
        self.thumbnails: dict[str, str] = {}

    def galleries(self) -> list[Gallery]:
        """All galleries that have a case."""
        made = [self._pairs(), self._shared_mentions(), self._shared_entities(), self._misleading()]
        made += [self._contradictions()]
        return [gallery for gallery in made if gallery.cases]

    def _pairs(self) -> Gallery:
        m = self._m
        rows = np.flatnonzero(m.gold_distance >= 0)
        pairs = mix(m.picture, m.of_gold("picture"))
        nearest = _distinct(rows[np.argsort(m.gold_distance[rows], kind="stable")], pairs, PAIRS_SHOWN)
        cases = []
        for row in nearest:
            same = m.picture[row] == m.of_gold("picture")[row]
            distance = "same bytes" if same else f"{m.gold_distance[row]} of 64 bits differ"
            cases.append(self._case(row, {"distance": distance}))
        about = (
            f"Each pair of pictures once. Near-same is a distance of at most {NEAR_SAME}; others are shown to compare."
        )
        return Gallery("Mention and gold pictures that are nearest", about, cases)

    def _shared_mentions(self) -> Gallery:
        m = self._m
        cases = []
        for rows in _groups(m.picture, m.gold):
            shown: list[Shown] = []
            golds = []
            for row in _distinct(rows, m.gold, 4):
                read = self._scan.row(row)
                shown = shown or [Shown("the picture", self._thumbnail(read["mention_image"]))]
                golds.append(f"{read['mention']} → {self._gold(row, read)[0]}")
            cases.append(Case(shown, {"shown for": excerpt("; ".join(golds)), "rows": f"{len(rows):,}"}))
        return Gallery("One mention picture, several answers", "Those of most rows first.", cases)

    def _shared_entities(self) -> Gallery:
        scan = self._scan
        cases = []
        for entities in _groups(scan.entities["picture"], scan.entities["qid"]):
            read = [scan.entity(int(entity)) for entity in entities[:4]]
            names = [f"{one['name']} ({one['qid']})" for one in read]
            more = f"; and {len(entities) - 4:,} more" if len(entities) > 4 else ""
            shown = [Shown("the picture", self._thumbnail(read[0]["image"]))]
            cases.append(Case(shown, {"entities": excerpt("; ".join(names)) + more}))
        return Gallery("One picture, several entities", "Those of most entities first.", cases)

    def _misleading(self) -> Gallery:
        m = self._m
        misled = np.flatnonzero((m.equal_names == 1) & ~m.gold_name_equal)
        cases = []
        for row in _distinct(misled, m.name, OTHERS_SHOWN):
            namesake, image = self._namesake(row)
            case = self._case(row, {"of that name": namesake})
            cases.append(_case([*case.shown, Shown("of that name", self._thumbnail(image))], case.facts))
        return Gallery("Names that mislead", "Only another entity has the mention's name.", cases)

    def _namesake(self, row: int) -> tuple[str, Row | None]:
        """Qid and picture of the entity that has the mention's name."""
        name = self._m.name[row]
        if self._scan.is_knowledge_base:
            entity = self._scan.entity(int(np.flatnonzero(self._scan.entities["name"] == name)[0]))
            return str(entity["qid"]), entity["image"]
        first, count = int(self._m.first[row]), int(self._m.count[row])
        place = int(np.flatnonzero(self._scan.candidates["name"][first : first + count] == name)[0])
        read = self._scan.row(row)
        return str(read["candidate_qids"][place]), read["candidate_images"][place]

    def _contradictions(self) -> Gallery:
        m = self._m
        cases = []
        for rows in _groups(m.said, m.gold):
            read = [(row, self._scan.row(row)) for row in _distinct(rows, m.gold, 4)]
            golds = [f"{self._gold(row, one)[0]} ({one['answer_qid']})" for row, one in read]
            facts = {
                "ids": excerpt(", ".join(str(one["id"]) for _, one in read)),
                "mention": excerpt(read[0][1]["mention"]),
            }
            facts |= {"sentence": excerpt(read[0][1]["context"]), "answers": excerpt("; ".join(golds))}
            shown = [Shown("mention", self._thumbnail(one["mention_image"])) for _, one in read[:2]]
            cases.append(_case(shown, facts))
        return Gallery("One mention and sentence, several answers", "Those of most rows first.", cases)

    def _case(self, row: int, facts: dict[str, str]) -> Case:
        """A row with the pictures of mention and gold."""
        read = self._scan.row(row)
        name, image = self._gold(row, read)
        shown = [Shown("mention", self._thumbnail(read["mention_image"])), Shown("gold", self._thumbnail(image))]
        told = {"id": excerpt(read["id"]), "mention": excerpt(read["mention"]), "gold": excerpt(name)}
        return Case(shown, told | facts)

    def _gold(self, row: int, read: Row) -> tuple[str, Row | None]:
        """Name and picture of a row's gold; its Qid stands for a name that it has not."""
        if self._scan.is_knowledge_base:
            place = int(self._m.gold_entity[row])
            entity = self._scan.entity(place) if place >= 0 else {"name": None, "image": None}
            return _name(entity["name"], read), entity["image"]
        if self._m.gold_candidate[row] < 0:
            return _name(None, read), None
        answer = read["answer"]
        return _name(read["candidate_names"][answer], read), read["candidate_images"][answer]

    def _thumbnail(self, image: Row | None) -> str | None:
        """Keeps a small copy of a picture; None where there is none."""
        if image is None or not image["bytes"]:
            return None
        key = f"{digest(image['bytes']):016x}"
        if key not in self.thumbnails:
            try:
                picture = decode_image(image["bytes"])
            except UnusableImageError:
                return None
            self.thumbnails[key] = base64.b64encode(_jpeg(picture)).decode()
        return key


def _case(shown: list[Shown], facts: dict[str, str]) -> Case:
    """Makes a case, without pictures where none of them can be had."""
    return Case(shown if any(one.picture for one in shown) else [], facts)


def _jpeg(picture: Image.Image) -> bytes:
    ratio = min(1.0, THUMBNAIL_SIDE / max(picture.size))
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _groups(keys: Digests, values: Digests) -> Iterator[NDArray[np.int64]]:
    """Yields the positions of each key that has several values, the largest groups first."""
    members = np.flatnonzero(several(keys, values))
    found, first, counts = np.unique(keys[members], return_index=True, return_counts=True)
    for number in np.lexsort((first, -counts))[:SHARED_SHOWN]:
        yield members[keys[members] == found[number]]


def _distinct(positions: Iterable[int], keys: Digests, most: int) -> list[int]:
    """Returns the first positions that have different keys."""
    chosen: dict[int, int] = {}
    for position in positions:
        if len(chosen) == most:
            break
        chosen.setdefault(int(keys[position]), int(position))
    return list(chosen.values())


def _name(name: str | None, read: Row) -> str:
    return name or str(read["answer_qid"])
