"""The architecture, checked and not only drawn: who may import whom.

`archs` stands alone. Inside `fpwap` the parts know each other's types at most, by the table below; only the outer ring
joins them. Nobody imports the reference library but `fpwap.reference`, when it is asked for.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOREIGN = {"transformers", "accelerate"}
EXTRAS = {"tokenizers", "matplotlib"}

OUTER = {
    *(
        "__init__",
        "__main__",
        "calibrate",
        "cli",
        "commits",
        "counting",
        "demo",
        "draft",
        "engine",
        "identity",
        "prepare",
    ),
    *("result", "sweep", "text", "verify", "watch"),
}
"""May import parts."""
VOCABULARY = {"errors", "schedule", "callbacks.base", "device", "interrupt", "files", "folder", "foreign"}
"""Words that all parts share: exceptions, stages, sites, what callbacks return, the device, how to wait, files."""
TYPES = {
    "context": {"prompts"},
    "callbacks.common": {"callbacks.moments"},
    "meter": {"machine"},
    "outbox": {"store"},
    "costs": {"outbox", "rates", "recipes", "residual"},
    "plan": {"costs", "rates", "residual", "ways"},
    "ways": {"costs", "residual"},
    "residual": {"slots"},
    "reading": {"checkpoint"},
    "parcels": {"checkpoint", "formats"},
    "recipes": {"checkpoint", "formats", "parcels", "reading"},
    "weights": {"checkpoint", "formats", "parcels", "reading", "recipes"},
    "taps": {"prompts", "sites", "store"},
}
"""part -> parts whose types (and, of sites, whose facts) it uses."""


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT / package).with_suffix("").parts), path


def imported(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether at the top level of the file) of everything a file imports, relative names resolved."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    parents = [package, *path.relative_to(ROOT / package).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [alias.name for alias in node.names]
            for name in names:
                inner = ROOT.joinpath(*stem, f"{name}.py")
                yield ".".join([*stem, name] if inner.exists() else stem), id(node) in top


def test_archs_needs_torch_and_einops_only() -> None:
    for name, path in modules("archs"):
        for module, _ in imported(path, "archs"):
            top = module.split(".")[0]
            assert top in {"archs", "torch", "einops"} or top in __import__("sys").stdlib_module_names, (name, module)


@pytest.mark.parametrize(("name", "path"), list(modules("fpwap")), ids=lambda value: str(value))
def test_parts_do_not_import_each_other(name: str, path: Path) -> None:
    for module, at_top in imported(path, "fpwap"):
        top = module.split(".")[0]
        assert top not in FOREIGN or (name == "reference" and not at_top), f"{name} imports {module}"
        if top in EXTRAS:
            assert not at_top, f"{name} needs the extra {module} to be imported at all"
        if top != "fpwap" or name.split(".")[-1] == "__init__" or name in OUTER:
            continue
        part = module.removeprefix("fpwap").lstrip(".")
        if part in ("", "callbacks"):
            continue
        allowed = VOCABULARY | TYPES.get(name, set())
        assert part in allowed, f"{name} imports {part}: parts meet in the outer ring only"


def test_the_table_has_no_arrow_that_is_not_used() -> None:
    arrows = {name: {m.removeprefix("fpwap.") for m, _ in imported(path, "fpwap")} for name, path in modules("fpwap")}
    for name, parts in TYPES.items():
        assert parts <= arrows[name], (name, parts - arrows[name])
