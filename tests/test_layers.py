"""The arrows of ARCHITECTURE go one way: a module imports only modules of lower rank (and those beside it, below)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "ncpvae"
LAYERS = [
    "ops distributions nn _random _files _distributed _tokens pretrained _description",
    "hierarchy vae nvae text_vae pixelcnn classifiers critics info",
    "samplers",
    "sharding",
    "priors",  # a prior's default sampler comes from samplers, never the other way round
    "objectives",
    "metrics data plots bench",
    "report train",
    "adapters recipes",
    "runs",
    "cli",
    "__main__ __init__",
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer.split()}
BESIDE = 2  # below this rank modules may import each other; `ops` imports nothing of ours even so


def allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    below = RANK[imported] < RANK[importer] or RANK[imported] == RANK[importer] < BESIDE
    return below and importer != "ops"


def imports(path: Path) -> set[str]:
    """Our top-level modules that the file at `path` imports, anywhere in it."""
    package, found = ["ncpvae", *path.relative_to(PACKAGE).with_suffix("").parts][:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = [*parents, *filter(None, [node.module])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    ours = [name.split(".") for name in found if name.split(".")[0] == "ncpvae"]
    names = {parts[1] if len(parts) > 1 else "__init__" for parts in ours} - {"__version__", "_C"}
    # `from ncpvae import name` with a name that is no module takes it from the package's own __init__.
    return {name if name in RANK or is_module(name) else "__init__" for name in names}


def is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def module_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    importer = module_of(path)
    assert importer in RANK, f"give {importer} a place in LAYERS"
    for imported in imports(path):
        assert imported in RANK, f"give {imported} a place in LAYERS"
        assert allowed(importer, imported), f"{importer} must not import {imported}"


def test_the_rules_are_those_of_the_architecture():
    for importer, imported in [
        ("vae", "nn"),
        ("priors", "samplers"),
        ("metrics", "priors"),
        ("train", "objectives"),
        ("cli", "train"),
    ]:
        assert allowed(importer, imported)
    for importer, imported in [
        ("ops", "nn"),
        ("samplers", "priors"),
        ("vae", "data"),
        ("objectives", "train"),
        ("metrics", "train"),
        ("metrics", "data"),
        ("train", "cli"),
        ("nn", "vae"),
        ("runs", "__init__"),
    ]:
        assert not allowed(importer, imported)


@pytest.mark.parametrize(
    ("where", "source", "found"),
    [
        ("vae.py", "from . import nn, data", {"nn", "data"}),
        ("vae.py", "from .train.engine import x", {"train"}),
        ("vae.py", "import ncpvae.priors as p", {"priors"}),
        ("vae.py", "def f():\n    from ncpvae import cli", {"cli"}),
        ("vae.py", "from ncpvae import some_function", {"__init__"}),
        ("vae.py", "import torch.nn, os", set()),
        (
            "priors/base.py",
            "from .. import ops\nfrom ..samplers import SIR\nfrom . import gaussian",
            {"ops", "samplers", "priors"},
        ),
        ("priors/__init__.py", "from .base import x", {"priors"}),
    ],
)
def test_every_form_of_import_is_seen(where, source, found, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert imports(path) == found
