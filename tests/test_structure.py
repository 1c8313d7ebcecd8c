"""What the layout promises: names that are unique, and documents short enough to be read."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_gpt_scratch"
COMMANDS = {path.name for path in PACKAGE.glob("*.py")}
README_LINES, README_WORDS = 150, 1600


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def test_module_names_are_unique() -> None:
    """Commands and their files in cli/ share names on purpose."""
    places = defaultdict(list)
    for path in modules():
        if path.parent != PACKAGE / "cli":
            places[path.name].append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_readme_fits_two_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert len(text.split()) <= README_WORDS


def test_results_in_the_readme_are_those_of_the_benchmarks_page() -> None:
    """Each figure is measured once: the README quotes the page."""
    results = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Ten results")[2].partition("##")[0]
    page = (ROOT / "notebooks" / "reference" / "benchmarks.md").read_text(encoding="utf-8")
    page += (ROOT / "notebooks" / "reference" / "hardware.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in results.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == 10
    for result, command in rows:
        figures = re.findall(r"\d+\.\d+(?:e-\d+)?", result)
        assert [figure for figure in figures if figure not in page] == []
        assert command.strip(" |`") in page
