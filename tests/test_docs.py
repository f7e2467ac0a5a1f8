"""Every path that README and docs/ARCHITECTURE.md name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT, ROOT / "pipelines", ROOT / "models")
_PATH = re.compile(r"(?<![\w/.=:-])((?:[a-z_0-9]+/)*[a-z_0-9A-Z]+\.(?:py|md|yaml|png))(?![\w/])")
# Files that the walk through a new model makes, and MLflow's name of a registered model's entry.
NOT_OURS = {"toy_model.py", "toy_recipe.py", "toy_row.py", "configs/models/toy.py", "pipelines/train/recipes/toy.py"}
NOT_OURS |= {"model.py"}


def named_files(text: str) -> set[str]:
    """Files that a page names outside of its code blocks; pictures without a folder are arguments of commands."""
    found = _PATH.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    return {path for path in found if "/" in path or not path.endswith(".png")}


@pytest.mark.parametrize("page", ["README.md", "docs/ARCHITECTURE.md", "docs/ADD_A_MODEL.md"])
def test_named_files_exist(page):
    files = named_files((ROOT / page).read_text())
    assert files
    found = {path for path in files if any((place / path).exists() for place in PLACES)}
    found |= {path for path in files if "/" not in path and any(ROOT.glob(f"*/**/{path}"))}
    missing = sorted(files - found - NOT_OURS)
    assert missing == []


def test_folders_of_the_trees_exist():
    """The indented blocks that draw the tree name folders of the repository, at their depth or anywhere below."""
    for page in ("README.md", "docs/ARCHITECTURE.md"):
        text = (ROOT / page).read_text()
        tree = text[text.index("    configs/  ") :].split("\n\n")[0]
        folders = set(re.findall(r"(?<![\w/])([a-z_0-9]+)/(?![\w])", tree))
        assert len(folders) > 15
        known = {
            path.name
            for layer in ("configs", "kernels", "models", "pipelines", "tests", "docs", "examples")
            for path in [ROOT / layer, *(p for p in (ROOT / layer).rglob("*") if p.is_dir())]
        }
        assert folders <= known, f"{page} names {sorted(folders - known)}"
