"""What the pages name is there: files, folders, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
FOLDERS = ("native", "gearcpp", "convert", "tests", "benchmarks", "examples", "docs", "tools")
SUFFIXES = ("cpp", "h", "cu", "cuh", "py", "sh", "md")
# A folder of the user's cache; files of llama.cpp's.
ELSEWHERE = {"gearcpp/shapes", "convert_hf_to_gguf.py", "llama-kv-cache-iswa.cpp", "llama-memory-hybrid.cpp", "models/*.cpp"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ is not here (it is in the repository)")


def expand(path: str) -> list[str]:
    """The paths that `a_{b,c}.py` stands for."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [name for word in found[1].split(",") for name in expand(path[: found.start()] + word + path[found.end() :])]


def named_paths(text: str) -> Iterator[str]:
    """Paths from the root of the repository, in prose, commands and drawings."""
    for found in re.finditer(rf"(?<![\w./~-])(?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*", text):
        yield from expand(found[0].rstrip(".,/"))


def named_files(text: str) -> Iterator[str]:
    """Names of sources in backticks, with or without a folder."""
    for found in re.finditer(rf"`([\w./*-]+\.(?:{'|'.join(SUFFIXES)}))`", text):
        yield found[1]


def is_there(path: str) -> bool:
    return path in ELSEWHERE or any(ROOT.glob(path))


def has_file(name: str, all_files: list[str]) -> bool:
    pattern = re.escape(name).replace(r"\*", "[^/]*")
    return name in ELSEWHERE or any(re.search(rf"(?:^|/){pattern}$", path) for path in all_files)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.fixture(scope="module")
def all_files() -> list[str]:
    folders = [ROOT / folder for folder in FOLDERS]
    return [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*") if path.is_file()] + [path.name for path in ROOT.glob("*")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path, all_files: list[str]) -> None:
    text = page.read_text()
    missing = [path for path in named_paths(text) if not is_there(path)]
    if page.name != "CHANGELOG.md":  # it tells of files that are gone
        missing += [name for name in named_files(text) if not has_file(name, all_files)]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists() or (anchor and anchor not in headings(linked)):
            missing.append(target)
    assert missing == []


def test_a_name_that_is_not_there_is_found(all_files: list[str]) -> None:
    text = "`native/codec/codec.cpp`, native/codec/none.cpp, `pytest tests/test_{docs,none}.py`, `none.cuh`, `codec.cpp`, `native/attention/kernels_*.cpp`"
    assert [path for path in named_paths(text) if not is_there(path)] == ["native/codec/none.cpp", "tests/test_none.py"]
    assert [name for name in named_files(text) if not has_file(name, all_files)] == ["none.cuh"]


def test_the_architecture_draws_every_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = set(re.findall(r"^    ([\w./]+)/ ", text, re.M))
    candidates = (
        [ROOT / folder for folder in FOLDERS]
        + [p for p in (ROOT / "native").rglob("*") if p.is_dir()]
        + [p for p in (ROOT / "gearcpp").iterdir() if p.is_dir()]
    )
    there = {str(p.relative_to(ROOT)) for p in candidates if p.name != "__pycache__" and any(q.is_file() and q.suffix != ".pyc" for q in p.iterdir())}
    there -= {"gearcpp/convert", "gearcpp/lib"}  # what an installation puts beside the sources
    assert there - drawn == set()
    assert {folder for folder in drawn if not (ROOT / folder).is_dir()} == set()


def test_the_pages_name_nothing_outside_of_the_repository() -> None:
    for page in PAGES:
        assert not re.search(r"gear_facts|\.\./shared|/work/", page.read_text()), page
