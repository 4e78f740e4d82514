from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "m3el_hf").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"m3el_hf.dataset_card", "m3el_hf.model_card"}
    assert set(setup()["options"]["packages"].split()) == packages


def test_every_data_file_of_the_package_is_installed():
    declared = setup()["options.package_data"]
    homes = {"m3el_hf.dataset_card": "dataset_card", "m3el_hf.model_card": "model_card"}
    found = {
        path
        for package, patterns in declared.items()
        for pattern in re.split(r"[,\s]+", patterns.strip())
        for path in (ROOT / homes.get(package, package.replace(".", "/"))).glob(pattern)
    }
    folders = (ROOT / "m3el_hf", ROOT / "dataset_card", ROOT / "model_card")
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= found


def test_every_dependency_has_a_tested_version():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open() if "==" in line
    }
    extras = setup()["options.extras_require"].values()
    needed = [setup()["options"]["install_requires"], *extras]
    names = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for text in needed for line in text.split()}
    assert names <= pinned
