"""The walls: imports point one way, modules fit on a few screens, names stay in."""

import ast
import pathlib
import re
import statistics

import pytest

import wloss_jax

# The package that is imported, which stands elsewhere where a wheel is tested.
PACKAGE = pathlib.Path(wloss_jax.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From what stands on nothing to what stands on all of it, as data flows: samples are
# padded and masked, losses made means, means made gradients. A folder is one room.
ORDER = [
    "_checks",
    "_keywords",
    "_devices",
    "_jaxprs",
    "padding",
    "masks",
    "_sums",
    "_counting",
    "_arithmetic",
    "_division",
    "means",
    "weighting",
    "heads",
    "losses",
    "linear",
    "_parts",
    "_places",
    "_rows",
    "_aux",
    "_microbatches",
    "gradients",
    "_multi_steps",
    "running_mean",
    "nnx",
    "testing",
    "__init__",
]
every_module = pytest.mark.parametrize("module", MODULES)


def imports_of(module):
    """The modules of the package that one imports, and the names from each."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "wloss_jax":
                    yield alias.name.removeprefix("wloss_jax").lstrip("."), []
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            source = node.module or ""
            if source.split(".")[0] == "wloss_jax":
                names = [alias.name for alias in node.names]
                yield source.removeprefix("wloss_jax").lstrip("."), names


def room(module):
    return module.split(".")[0]


def rooms_of(source, names):
    """`from wloss_jax import testing` imports the module, not the package."""
    return [room(source)] if source else [n for n in names if n in ORDER]


def test_every_module_has_its_place_in_the_order():
    assert {room(module) for module in MODULES} == set(ORDER)


@every_module
def test_imports_point_up_the_list_only(module):
    if module.endswith("__init__") and "." not in module:
        return  # the map imports them all
    own = ORDER.index(room(module))
    for source, names in imports_of(module):
        for imported in rooms_of(source, names):
            assert ORDER.index(imported) <= own, f"{module} imports {imported}"
            assert imported != room(module) or "." in module


def test_no_chapters_of_a_folder_import_in_a_circle():
    edges = {
        module: {
            imported
            for source, names in imports_of(module)
            if room(source) == room(module) and "." in module
            for imported in chapters_of(source, names)
        }
        for module in MODULES
    }
    done = set()
    while ready := {m for m in MODULES if m not in done and edges[m] <= done}:
        done |= ready
    assert done == set(MODULES)


def chapters_of(source, names):
    """The modules that are imported, or imported from."""
    if source in MODULES:
        return {source}
    inside = {f"{source}.{name}" for name in names}
    return inside if inside <= set(MODULES) else {f"{source}.__init__"}


@every_module
def test_no_name_with_an_underscore_crosses_a_module(module):
    for source, names in imports_of(module):
        for name in names:
            is_module = f"{source}.{name}".lstrip(".") in MODULES
            assert is_module or name.startswith("__") or not name.startswith("_")


def test_only_the_flax_module_imports_flax():
    importers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        if any(
            name.split(".")[0] == "flax"
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
        )
    }
    assert importers == {"nnx"}


def test_less_public_modules_of_jax_stand_in_two_files():
    """What JAX may move is in one room for primitives, and in one for programs."""
    found = {
        module: {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute | ast.ImportFrom)
            and re.match(
                r"(from )?(jax\.(interpreters|extend|_src|core)|jaxlib)\b",
                ast.unparse(node),
            )
        }
        for module, path in MODULES.items()
    }
    # To ask whether something is traced is as public as it gets.
    public = {"jax.core", "jax.core.Tracer"}
    assert {module for module, uses in found.items() if uses - public} == {
        "_jaxprs",
        "linear._primitives",
    }


def test_modules_fit_on_a_few_screens():
    lengths = [len(path.read_text().splitlines()) for path in MODULES.values()]
    assert max(lengths) <= 375
    assert statistics.median(lengths) <= 220
