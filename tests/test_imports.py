"""Imports point one way, configs <- kernels <- models <- pipelines, and in no circle; functions' imports count too."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("configs", "kernels", "models", "pipelines")


def modules() -> dict[str, Path]:
    found = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            name = ".".join(("kinema", *path.relative_to(ROOT).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path], text: str) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {target for target in found if target in known} - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports_of(name, path, known, path.read_text()) for name, path in known.items()}


def test_no_circle(graph):
    assert len(graph) > 150
    assert circles(graph) == [], "these files import each other"


def test_layers_point_one_way(graph):
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if LAYERS.index(target.split(".")[1]) > LAYERS.index(name.split(".")[1])
    ]
    assert wrong == []


def test_a_circle_would_be_named():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]
    known = {"kinema.configs.a": ROOT / "a.py", "kinema.configs.b": ROOT / "b.py"}
    inside = "def f():\n    from kinema.configs import b\n"
    assert imports_of("kinema.configs.a", known["kinema.configs.a"], known, inside) == {"kinema.configs.b"}


def test_models_know_nothing_of_ray_mlflow_or_storage():
    banned = {"ray", "mlflow", "fsspec", "webdataset", "pyarrow", "omegaconf"}
    for path in (p for layer in ("kernels", "models") for p in (ROOT / layer).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not banned & {name.partition(".")[0] for name in names}, path


def test_no_large_rooms():
    sizes = {p.relative_to(ROOT): p.read_text().count("\n") for p in modules().values()}
    assert {path: n for path, n in sizes.items() if n > 500} == {}
    assert sorted(sizes.values())[len(sizes) // 2] < 200
