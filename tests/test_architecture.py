"""Who may import whom, read from the source; and what `fishertool --help` may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fishertool

PACKAGE = Path(fishertool.__file__).parent

# What each part may import of ours; a part is a folder or a top-level file.
CHECKPOINTS = {"errors", "paths", "checkpoint", "progress", "report"}
LIBRARIES = CHECKPOINTS | {
    "plugin",
    "registry",
    "selection",
    "calibration",
    "hub",
    "fisher",
    "sidecar",
}
PURE = {"factorization", "merging", "pruning"}
UPPER = LIBRARIES | PURE | {"models", "evaluation", "estimation", "recipe"}
UPPER |= {"surgery", "searching", "inspection"}
PUBLISHING = {"hub_push", "model_card"}
MAY_IMPORT = {
    "__init__": {"plugin"},
    "plugin": set[str](),
    "model_card": {"plugin"},
    "errors": set[str](),
    "paths": set[str](),
    "progress": set[str](),
    "memory": set[str](),
    "launcher": {"errors"},
    "registry": {"errors"},
    "selection": {"errors"},
    "report": {"errors", "paths", ""},
    "config": {"errors", "recipe", "registry"},
    "hub": {"errors", "paths"},
    "hub_push": {"errors"},
    "calibration": {"errors", "paths", "calibration"},
    "checkpoint": {"errors", "checkpoint"},
    "fisher": {"errors", "registry", "fisher"},
    "merging": {"errors", "registry", "fisher", "merging"},
    "factorization": {"errors", "registry", "fisher", "factorization"},
    "pruning": {"errors", "registry", "fisher", "pruning"},
    "recipe": {"errors", "paths", "registry", "recipe"},
    "sidecar": {"errors", "checkpoint", "fisher"},
    "models": LIBRARIES | {"models"},
    "estimation": LIBRARIES | {"models", "estimation", "launcher"},
    "evaluation": LIBRARIES | {"models", "evaluation"},
    "inspection": LIBRARIES | {"models", "estimation", "surgery", "inspection"},
    "surgery": LIBRARIES | PURE | {"models", "estimation", "recipe", "surgery"},
    "searching": UPPER,
    "commands": UPPER | PUBLISHING,
    "cli": {"cli", "errors", "launcher", "memory", "paths", "registry", ""},
    "__main__": {"cli"},
}
LAZILY = {
    "__init__": {"models"},
    "plugin": {"models"},
    "cli": {
        "calibration",
        "checkpoint",
        "commands",
        "config",
        "estimation",
        "progress",
        "recipe",
        "report",
        "surgery",
    },
}
ONLY_IN = {
    "typer": {"cli"},
    "rich": {"progress"},
    "safetensors": {"checkpoint"},
    "transformers": {"models"},
    "datasets": {"calibration"},
    "huggingface_hub": {"hub", "hub_push", "model_card", "calibration"},
    "botorch": {"searching"},
    "gpytorch": {"searching"},
}
WITHOUT_TORCH = {
    "__init__",
    "plugin",
    "cli",
    "memory",
    "launcher",
    "config",
    "errors",
    "paths",
    "report",
    "selection",
    "registry",
    "progress",
    "hub",
    "hub_push",
    "model_card",
    "recipe",
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names a file imports, and whether inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fishertool":
                yield from ((f"fishertool.{a.name}", id(node) in inside) for a in node.names)
            else:
                yield node.module or "", id(node) in inside


def part_of(name: str) -> str:
    parts = name.split(".")
    known = len(parts) > 1 and parts[1] in MAY_IMPORT
    return parts[1] if known else ""  # such as fishertool.__version__


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_import_rules(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    for name, lazy in imports(path):
        top = name.split(".")[0]
        if top == "fishertool":
            allowed = MAY_IMPORT[part] | (LAZILY.get(part, set()) if lazy else set())
            assert part_of(name) in allowed, f"{relative} imports {name}"
            if part == "commands":
                assert not name.startswith("fishertool.commands"), f"{relative} imports {name}"
        elif top in ONLY_IN:
            assert part in ONLY_IN[top], f"{relative} imports {name}"
        elif top == "torch":
            assert part not in WITHOUT_TORCH, f"{relative} imports {name}"
        assert top != "click", "typer brings its own"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from fishertool.cli import main; code = main(['merge', '--help']);"
        "loaded = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fisher" in done.stdout
