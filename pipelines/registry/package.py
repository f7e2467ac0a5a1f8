"""A model as a folder that needs nothing of ours to run: weights, config, and the sources it is built from.

The sources travel as a package with a name of its own (`kinema_flowfeat_<hash>`): in the consumer's process neither
an installed `kinema` nor a folder called `models` can take its place. They may import torch and numpy only; what
annotations need of jaxtyping is replaced, and einops, which is plain Python, is carried along.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from kinema.configs.json_text import json_text
from kinema.configs.models.row import ModelRow
from kinema.configs.models.table import MODELS
from kinema.pipelines.registry.card import serving_form
from kinema.pipelines.train.recipes.protocol import ExportedModel

SHIPPED = Path(__file__).parent / "shipped"
ALLOWED = frozenset({"torch", "numpy", "mlflow"}) | sys.stdlib_module_names
REPLACED = {"jaxtyping": "shapes"}
CARRIED = ("einops",)
OPTIONAL = frozenset({"triton"})


@dataclass(frozen=True)
class Package:
    """Where the parts of a packaged model lie."""

    weights: Path
    config: Path
    code: Path
    """The package folder, to be copied under this name."""
    entry: Path
    """File that MLflow runs to get the model object."""
    serving: str
    """Module of `shipped` that answers `predict`."""
    content_hash: str
    """blake2b-128 over weights and config; equal models, equal hash."""


def package(model: ExportedModel, folder: Path) -> Package:
    """Write the model into an empty or new folder.

    Raises: ValueError for an architecture that has no builder here, or sources that need more than torch and numpy.
    """
    row = MODELS.get(model.architecture)
    if row is None or not row.serving:
        known = ", ".join(name for name, other in MODELS.items() if other.serving)
        raise ValueError(f"architecture {model.architecture!r} is not known; known are {known}")
    form = serving_form(row)
    module, _, maker = maker_of(row, model.config).partition(":")
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / "weights.safetensors", folder / "config.json"
    # Clones, since a file cannot hold two names of one tensor.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.tensors.items()}, weights)
    description = {
        "architecture": model.architecture,
        "module": shipped_name(module),
        "class": maker,
        "serving": row.serving,
        "arguments": dict(model.config),
        "inputs": dict(model.inputs),
        "licences": dict(model.licences),
    }
    config.write_text(json_text(description, indent=2, sort_keys=True) + "\n")
    digest = hashlib.blake2b(weights.read_bytes() + config.read_bytes(), digest_size=16).hexdigest()
    code = write_code((module, *getattr(form, "ALSO", ())), f"kinema_{model.architecture}", folder / "code")
    entry = folder / "model.py"
    imports = f"from mlflow.models import set_model\n\nfrom {code.name}.predictor import Predictor\n"
    entry.write_text(f"{imports}\nset_model(Predictor())\n")
    return Package(weights, config, code, entry, row.serving, digest)


def maker_of(row: ModelRow, arguments: Mapping[str, Any]) -> str:
    """What makes the network, `module:attribute`: its class, or the row's function for a network of one form."""
    return row.network if arguments or row.presets else row.build


def shipped_name(module: str) -> str:
    """Where a module lies in the package: ours without `kinema`, others under their full names."""
    return module.removeprefix("kinema.")


def write_code(modules: str | Sequence[str], prefix: str, folder: Path) -> Path:
    """The sources that `modules` need, and the shipped ones, as a package `prefix_<hash>` in `folder`.

    Returns: the package's folder.
    """
    sources = {path.name: path.read_text() for path in sorted(SHIPPED.glob("*.py"))}
    wanted = (modules,) if isinstance(modules, str) else modules
    closure = {name: path for module in wanted for name, path in module_closure(module).items()}
    for name, path in sorted(closure.items()):
        parts = shipped_name(name).split(".")
        for depth in range(1, len(parts)):
            sources.setdefault("/".join([*parts[:depth], "__init__.py"]), "")
        is_package = path.name == "__init__.py"
        sources["/".join(parts) + ("/__init__.py" if is_package else ".py")] = path.read_text()
    for library in CARRIED:
        sources |= _library_sources(library)
    digest = hashlib.blake2b(json_text(sources, sort_keys=True).encode(), digest_size=6).hexdigest()
    package_name = f"{prefix}_{digest}"
    own = {name.partition(".")[0] for name in closure} - {"kinema"}
    for name, text in sources.items():
        target = folder / package_name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_renamed_imports(text, package_name, own) if name.endswith(".py") else text)
    return folder / package_name


def module_closure(module: str) -> dict[str, Path]:
    """`module` and every module of its package and of kinema that it imports, at any depth: {dotted name: file}.

    Raises: ValueError if one of them imports, when it is loaded, something that a consumer need not have.
    """
    packages = {"kinema", module.partition(".")[0]}
    needed = _reachable(module, packages, only_when_loaded=True)
    found = _reachable(module, packages, only_when_loaded=False)
    for name, path in found.items():
        # What only functions import may need an optional library: the function that does so asks for it first.
        allowed = ALLOWED | REPLACED.keys() | set(CARRIED) | packages | (frozenset() if name in needed else OPTIONAL)
        for target in _imports(ast.parse(path.read_text()).body, _package_of(name, path)):
            top = target.partition(".")[0]
            if top not in allowed:
                raise ValueError(f"{name} imports {top}, which consumers of a registered model need not have")
    return {name: path for name, path in found.items() if name not in ("kinema", "kinema.models", "kinema.kernels")}


def _reachable(module: str, packages: set[str], only_when_loaded: bool) -> dict[str, Path]:
    """Modules of the packages that `module` imports, itself included; when loaded, or in functions too."""
    found: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        spec = None if name in found else find_spec(name)
        if spec is None or spec.origin is None:
            continue  # seen, or `from module import function`: the function is no module
        path = found[name] = Path(spec.origin)
        tree = ast.parse(path.read_text())
        nodes = tree.body if only_when_loaded else list(ast.walk(tree))
        for target in set(_imports(nodes, _package_of(name, path))):
            if target.partition(".")[0] in packages:
                queue += [target] if _is_module(target) else [target.rpartition(".")[0]]
    return found


def _package_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def _library_sources(library: str) -> dict[str, str]:
    """A plain Python library's modules and its licence, by their places in the package."""
    spec = find_spec(library)
    assert spec is not None and spec.origin is not None, f"{library} is a dependency"
    sources = {f"{library}/{p.name}": p.read_text() for p in sorted(Path(spec.origin).parent.glob("*.py"))}
    for file in importlib.metadata.files(library) or []:
        if file.name.startswith("LICENSE"):
            sources[f"{library}/LICENSE"] = file.read_text()
    return sources


def _imports(nodes: list[ast.stmt] | list[ast.AST], parent: str) -> Iterator[str]:
    """Dotted names that import statements among the nodes mention; for `from a import b` both `a` and `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), parent) if node.level else node.module or ""
            yield base
            if base.partition(".")[0] not in ALLOWED:
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _renamed_imports(text: str, package_name: str, own: set[str]) -> str:
    """Imports of kinema go to the package, those of the model's own package and of carried libraries below it."""
    text = re.sub(r"(?m)^(\s*(?:from|import)\s+)kinema\b", rf"\1{package_name}", text)
    for name in (*own, *CARRIED):
        text = re.sub(rf"(?m)^(\s*from\s+){name}\b", rf"\1{package_name}.{name}", text)
    for library, stand_in in REPLACED.items():
        text = re.sub(rf"(?m)^(\s*from\s+){library}(\s+import)", rf"\1{package_name}.{stand_in}\2", text)
    return text
