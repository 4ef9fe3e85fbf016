"""Rules of the source that no other test would notice: layers point one way, other packages are left as they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.conftest import ROOT

SOURCE = ROOT / "src" / "sftx"
LAYERS = ("base", "config", "data", "model", "parallel", "training", "runs", "commands")
"""A layer imports from those before it, and from itself."""
LAYER_OF = {"build": "config", "run": "runs", "cli": "commands", "__main__": "commands"}
"""Modules at the top; the others there are `base`."""
ALLOWED_SETTINGS = {
    "commands/train.py sets logging.raiseExceptions",
    "data/files/hub.py sets datasets.config.HF_HUB_OFFLINE",
    "model/kernels/compiled.py sets torch._dynamo.config.recompile_limit",
    "parallel/ddp.py sets os.environ",  # by `|=`
    "runs/trackers.py sets sys.argv",
}
"""Documented switches of other packages."""
UNDERSCORED: set[str] = {
    "torch._dynamo",  # the limits of recompilation have no public name
}
"""Underscore modules of other packages that may be imported."""
STEPS = {"parallel/stepper.py"}
"""The only module in which an optimizer of a run makes a step."""
PROBED_STEPS = {"training/saving/preflight.py"}
"""An optimizer of one parameter is tried there, to see how much state it keeps."""


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def layer(module: str) -> str:
    """Return the layer of a module, given with dots and without `sftx.`."""
    top = module.partition(".")[0]
    return LAYER_OF.get(top, top if top in LAYERS else "base")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def targets(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield what is assigned to, one at a time."""
    for node in ast.walk(tree):
        found = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            found = [node.target]
        for target in found:
            yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def is_upward(importer: str, imported: str) -> bool:
    return LAYERS.index(layer(imported)) > LAYERS.index(layer(importer))


def test_layers_point_one_way() -> None:
    found = {
        f"{name_of(path)} imports {name}"
        for path in sources()
        for _, name in imports(tree_of(path))
        if name.startswith("sftx.")
        and is_upward(name_of(path).removesuffix(".py").replace("/", "."), name.removeprefix("sftx."))
    }
    assert not found


def test_no_underscore_module_of_another_package_is_imported() -> None:
    found = set()
    for path in sources():
        for _, name in imports(tree_of(path)):
            parts = name.split(".")
            if parts[0] == "sftx" or name.startswith("__future__"):
                continue
            private = next((i for i, part in enumerate(parts) if part.startswith("_") and part != "__version__"), None)
            if private is not None and ".".join(parts[: private + 1]) not in UNDERSCORED:
                found.add(f"{name_of(path)} imports {name}")
    assert found == set()


def test_classes_and_methods_of_others_are_not_replaced() -> None:
    found = set()
    for path in sources():
        for target in targets(tree_of(path)):
            if isinstance(target, ast.Attribute) and target.attr == "__class__":
                found.add(f"{name_of(path)} sets __class__")
            if isinstance(target, ast.Attribute) and target.attr == "forward" and not _is_own(target):
                found.add(f"{name_of(path)} sets .forward")
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "sys.modules":
                found.add(f"{name_of(path)} sets sys.modules[...]")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.meta_path":
                found.add(f"{name_of(path)} uses sys.meta_path")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__"):
                owner = ast.unparse(node.args[0]) if node.args else ""
                if owner != "self":
                    found.add(f"{name_of(path)} calls setattr({owner}, ...)")
    assert not found


def _is_own(target: ast.Attribute) -> bool:
    return isinstance(target.value, ast.Name) and target.value.id == "self"


def test_an_attribute_of_an_imported_module_is_not_set() -> None:
    found = set()
    for path in sources():
        tree = tree_of(path)
        modules = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for target in targets(tree):
            base = target
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(target, ast.Attribute) and isinstance(base, ast.Name) and base.id in modules:
                found.add(f"{name_of(path)} sets {ast.unparse(target)}")
    assert found <= ALLOWED_SETTINGS, found - ALLOWED_SETTINGS


def test_an_optimizer_steps_in_one_place() -> None:
    found = set()
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
                owner = ast.unparse(node.func.value)
                if owner.endswith("optimizer"):
                    found.add(name_of(path))
    assert found - PROBED_STEPS == STEPS


def test_no_folder_has_more_than_15_modules() -> None:
    crowded = {
        name_of(folder): len(modules)
        for folder in [SOURCE, *(p for p in SOURCE.rglob("*") if p.is_dir())]
        if len(modules := [p for p in folder.glob("*.py") if not p.name.startswith("__")]) > 15
    }
    assert not crowded


@pytest.mark.parametrize(
    ("importer", "imported", "upward"),
    [
        ("data.feed", "model.load", True),
        ("model.load", "data.template", False),
        ("errors", "config.schema", True),
        ("run", "runs.begin", False),
        ("runs.rank", "run", False),
        ("training.loop", "runs.end", True),
    ],
)
def test_what_is_upward(importer: str, imported: str, upward: bool) -> None:
    assert is_upward(importer, imported) is upward
