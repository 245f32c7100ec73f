"""The documents' claims that a program can check: links, pictures, the README's length, who imports what."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

PACKAGE = "hwpq_pipeline"
LINK = re.compile(r"\]\(([^)\s]+)\)")
#: Left out of the table: most rooms import them.
COMMON = {"numpy", "torch", PACKAGE}


def pages(root: Path) -> list[Path]:
    """Every Markdown page that people read."""
    return [root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_and_pictures_are_there(root: Path) -> None:
    broken = []
    for page in pages(root):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            found = (page.parent / path).resolve() if path else page
            if not found.exists() or (anchor and anchor not in anchors(found)):
                broken.append(f"{page.relative_to(root)}: {target}")
    assert not broken, broken


def test_every_picture_is_shown(root: Path) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages(root))
    unused = [file.name for file in (root / "docs" / "images").iterdir() if f"images/{file.name})" not in text]
    assert not unused, unused


def test_readme_is_short(root: Path) -> None:
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def imports_of(place: Path) -> set[str]:
    """What a module or a folder imports from outside of the package and of the standard library."""
    found = set()
    for file in [place] if place.is_file() else place.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - COMMON


def rooms(root: Path) -> list[tuple[list[str], set[str]]]:
    """`docs/architecture.md`: the places in each row of the table of rooms, and the imports that the row names."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = []
    for line in text.partition("## The rooms")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        places = re.findall(r"`(\w+)(?:/[\w/<>]*|\.py)`", cells[0])
        if len(cells) == 3 and places:
            found.append((places, set(re.findall(r"`(\w+)`", cells[2]))))
    return found


def test_the_table_of_rooms_names_every_room(root: Path) -> None:
    package = root / "src" / PACKAGE
    there = {path.name for path in package.iterdir() if any(path.glob("*.py"))}
    there |= {path.stem for path in package.glob("*.py") if not path.name.startswith("__")}
    named = [place for places, _ in rooms(root) for place in places]
    assert sorted(named) == sorted(there)


def test_the_table_of_rooms_says_what_they_import(root: Path) -> None:
    """Exactly: an import that the row lacks, and a word in the row that is no import, both show."""
    package = root / "src" / PACKAGE
    for places, named in rooms(root):
        found = set()
        for place in places:
            found |= imports_of(package / place if (package / place).is_dir() else package / f"{place}.py")
        assert found == named, places


def test_the_listed_errors_are_the_codes_words(root: Path) -> None:
    """What stands before, between and after the `…` of each line is in the code; the machine's own words are not."""
    code = " ".join(file.read_text(encoding="utf-8") for file in sorted((root / "src").rglob("*.py")))
    rows = [
        line
        for line in (root / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) > 35
    for row in rows:
        said = row.removeprefix("| `").partition("` |")[0]
        if said in ("no space left on device", "permission denied"):
            continue
        for part in filter(None, (piece.strip(" (") for piece in said.split("…"))):
            assert part.strip() in code, row
