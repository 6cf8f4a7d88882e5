"""The arrows of the architecture, read from the source: who may import whom.

``fpwap`` may import ``archs``, never the other way. Inside ``fpwap`` the parts do not know each other; an outer ring
joins them, and what they share are types and words. Imports for the type checker alone do not count.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import archs
import fpwap

ROOTS = {package.__name__: Path(package.__file__ or "").parent for package in (archs, fpwap)}
EVERYTHING = "*"

OUTER_RING = {"__init__", "__main__", "cli", "demo", "engine", "identity", "prepare", "result", "sweep", "verify"}
"""Modules of ``fpwap`` that may import any part: they make one of many."""

SHARED: Mapping[str, set[str]] = {
    "errors": {EVERYTHING},
    "callbacks.base": {EVERYTHING},
    "machine": {EVERYTHING},
    "plan": {"Plan"},
    "prompts": {"Microbatch", "Prompts", "TokenTable", "View"},
    "residual": {"Tier"},
    "schedule": {"Schedule", "Stage"},
    "sites": {"PHASES", "where"},
    "store": {"Record"},
}
"""What parts may take from each other: the types that pass between them, the words for sites, facts of the machine."""

ARCHS_MAY_USE = {"archs", "torch", "einops"}
FPWAP_MAY_USE_OF_ARCHS = {"archs", "archs.batch", "archs.contract"}
"""``fpwap`` meets families only in the table: it imports none by name."""


def modules(package: str) -> dict[str, Path]:
    """Dotted name below the package -> file."""
    root = ROOTS[package]
    paths = {path.relative_to(root).with_suffix(""): path for path in root.rglob("*.py")}
    return {".".join(short.parts): path for short, path in sorted(paths.items())}


def imports(package: str, name: str, path: Path) -> Iterator[tuple[str, str]]:
    """``(module, name taken from it)`` of every import that runs, also inside functions; absolute dotted names."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((alias.name, EVERYTHING) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            here = [package, *name.split(".")]
            base = [
                *(here[: -node.level] if node.level else []),
                *((node.module or "").split(".") if node.module else []),
            ]
            for alias in node.names:
                below = ".".join([*base[1:], alias.name])
                if base[0] in ROOTS and below in modules(base[0]):
                    yield ".".join([*base, alias.name]), EVERYTHING
                else:
                    yield ".".join(base), alias.name


@pytest.mark.parametrize("name", modules("archs"))
def test_archs_knows_tensors_only(name: str) -> None:
    for module, _ in imports("archs", name, modules("archs")[name]):
        root = module.split(".")[0]
        assert root in ARCHS_MAY_USE or root in sys.stdlib_module_names, f"archs/{name} imports {module}"


@pytest.mark.parametrize("name", modules("fpwap"))
def test_fpwap_knows_the_contract_but_no_family(name: str) -> None:
    for module, _ in imports("fpwap", name, modules("fpwap")[name]):
        assert not module.startswith("archs") or module in FPWAP_MAY_USE_OF_ARCHS, f"fpwap/{name} imports {module}"
        assert module.split(".")[0] not in ("transformers", "accelerate") or name == "verify", f"fpwap/{name}"


@pytest.mark.parametrize("name", [name for name in modules("fpwap") if name not in OUTER_RING])
def test_parts_share_types_and_nothing_else(name: str) -> None:
    part = name.split(".")[0]
    for module, taken in imports("fpwap", name, modules("fpwap")[name]):
        if not module.startswith("fpwap.") or module.split(".")[1] == part:
            continue
        allowed = SHARED.get(module.removeprefix("fpwap."), set())
        assert allowed & {taken, EVERYTHING}, f"fpwap/{name} takes {taken} from {module}; only the outer ring may"


def test_the_tables_name_what_exists() -> None:
    assert set(SHARED) <= set(modules("fpwap"))
    assert OUTER_RING - {"verify"} <= set(modules("fpwap"))
