"""A model as a folder that needs nothing of ours to run: weights, config, and the sources it is built from.

The sources travel as a package with a name of its own (`kinema_flowfeat_<hash>`): in the consumer's process neither
an installed `kinema` nor a folder called `models` can take its place. They may import torch and numpy only; what
annotations need of jaxtyping is replaced.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec, resolve_name
from pathlib import Path

from safetensors.torch import save_file

from kinema.pipelines.train.recipes.protocol import ExportedModel

# Architecture -> module below kinema, class, names of what it returns.
ARCHITECTURES = {"flowfeat": ("models.flowfeat.model", "FlowFeat", ("y_enc", "y_dec"))}

SHIPPED = Path(__file__).parent / "shipped"
ALLOWED = frozenset({"torch", "numpy", "mlflow"}) | sys.stdlib_module_names
REPLACED = {"jaxtyping": "shapes"}


@dataclass(frozen=True)
class Package:
    """Where the parts of a packaged model lie."""

    weights: Path
    config: Path
    code: Path
    """The package folder, to be copied under this name."""
    entry: Path
    """File that MLflow runs to get the model object."""
    content_hash: str
    """blake2b-128 over weights and config; equal models, equal hash."""


def package(model: ExportedModel, folder: Path) -> Package:
    """Write the model into an empty or new folder.

    Raises: ValueError for an architecture that has no builder here, or sources that need more than torch and numpy.
    """
    if model.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {model.architecture!r} is not known; known are {', '.join(ARCHITECTURES)}")
    module, class_name, outputs = ARCHITECTURES[model.architecture]
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / "weights.safetensors", folder / "config.json"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.tensors.items()}, weights)
    description = {
        "architecture": model.architecture,
        "module": module,
        "class": class_name,
        "arguments": dict(model.config),
        "inputs": dict(model.inputs),
        "outputs": list(outputs),
        "licences": dict(model.licences),
    }
    config.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    digest = hashlib.blake2b(weights.read_bytes() + config.read_bytes(), digest_size=16).hexdigest()
    code = write_code(f"kinema.{module}", f"kinema_{model.architecture}", folder / "code")
    entry = folder / "model.py"
    imports = f"from mlflow.models import set_model\n\nfrom {code.name}.predictor import Predictor\n"
    entry.write_text(f"{imports}\nset_model(Predictor())\n")
    return Package(weights, config, code, entry, digest)


def write_code(module: str, prefix: str, folder: Path) -> Path:
    """The sources `module` needs, and the shipped ones, as a package `prefix_<hash>` in `folder`.

    Returns: the package's folder.
    """
    sources = {path.name: path.read_text() for path in sorted(SHIPPED.glob("*.py"))}
    for name, path in sorted(module_closure(module).items()):
        parts = name.split(".")[1:]  # without `kinema`
        for depth in range(1, len(parts)):
            sources.setdefault("/".join([*parts[:depth], "__init__.py"]), "")
        is_package = path.name == "__init__.py"
        sources["/".join(parts) + ("/__init__.py" if is_package else ".py")] = path.read_text()
    digest = hashlib.blake2b(json.dumps(sources, sort_keys=True).encode(), digest_size=6).hexdigest()
    package_name = f"{prefix}_{digest}"
    for name, text in sources.items():
        target = folder / package_name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_renamed_imports(text, package_name))
    return folder / package_name


def module_closure(module: str) -> dict[str, Path]:
    """`module` and every kinema module it imports, at any depth: {dotted name: file}.

    Raises: ValueError if one of them imports, when it is loaded, something that a consumer need not have.
    """
    found: dict[str, Path] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue  # `from module import function`: the function is no module
        path = Path(spec.origin)
        found[name] = path
        tree = ast.parse(path.read_text())
        parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
        loaded = set(_imports(tree.body, parent))
        for target in {*loaded, *_imports(list(ast.walk(tree)), parent)}:
            top = target.partition(".")[0]
            if top == "kinema":
                queue += [target] if _is_module(target) else [target.rpartition(".")[0]]
            elif target in loaded and top not in ALLOWED and top not in REPLACED:
                raise ValueError(f"{name} imports {top}, which consumers of a registered model need not have")
    return {name: path for name, path in found.items() if name not in ("kinema", "kinema.models")}


def _imports(nodes: list[ast.stmt] | list[ast.AST], parent: str) -> Iterator[str]:
    """Dotted names that import statements among the nodes mention; for `from a import b` both `a` and `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), parent) if node.level else node.module or ""
            yield base
            if base.startswith("kinema"):
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _renamed_imports(text: str, package_name: str) -> str:
    """Imports of kinema go to the package, imports of replaced libraries to their stand-ins."""
    text = re.sub(r"(?m)^(\s*(?:from|import)\s+)kinema\b", rf"\1{package_name}", text)
    for library, stand_in in REPLACED.items():
        text = re.sub(rf"(?m)^(\s*from\s+){library}(\s+import)", rf"\1{package_name}.{stand_in}\2", text)
    return text
