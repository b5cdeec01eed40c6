"""docs/settings.md names every environment variable, and native code reads them in one file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
READER = ROOT / "native/common/settings.cpp"
SUFFIXES = {".c", ".cpp", ".h", ".cu", ".cuh", ".py", ".sh"}


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]


def test_native_code_reads_the_environment_in_one_file() -> None:
    readers = [path for path in files("native") if "tests" not in path.parts and "getenv(" in path.read_text()]
    assert readers == [READER]


def test_the_page_names_every_variable() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    read = set(re.findall(r'"(G[A-Z]+_[A-Z_]+)"', READER.read_text()))
    assert len(read) > 5
    for path in files("gearcpp", "convert", "tests", "benchmarks"):
        text = path.read_text()
        read |= set(re.findall(r"""(?:environ(?:\.get\(|\[)|envvar=)["'](GEARCPP_\w+)""", text)) | set(re.findall(r"\$\{(GEARCPP_\w+)", text))
    for path in files("native/tests"):
        read |= set(re.findall(r'getenv\("(GEARCPP_\w+)"', path.read_text()))
    assert sorted(name for name in read if f"`{name}" not in page) == []
