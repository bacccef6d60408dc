"""One way through the house: nothing to the left imports from the right, in no circle."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import blora_pyro

HOUSE = Path(blora_pyro.__file__).parent
TESTS = Path(__file__).parent
ORDER = (  # of the rooms and of the files beside them, as CONTRIBUTING.md has it
    *(
        "terminal",
        "errors",
        "files",
        "hub",
        "families",
        "languages",
        "sources",
        "tables",
    ),
    *("plotting", "declarations", "options"),
    *("data", "metrics", "low_rank", "adapters", "models", "guides", "fitting"),
    *("posterior", "diagnostics", "transcription", "evaluation"),
    *("runs", "studies", "publishing", "cli"),
)
FILES = sorted(path for path in HOUSE.rglob("*.py") if not path.stem.startswith("__"))
# Tests of what no single module does.
ACROSS = {
    "cli/test_cli.py",
    "data/test_pocket_assets.py",
    "fitting/test_conjugate.py",
    "fitting/test_planted_rank.py",
    "guides/test_families.py",
    "models/test_geometries.py",
    "runs/test_mapped_languages.py",
    "runs/test_old_runs.py",
    "runs/test_pocket_fit.py",
    "runs/test_pooled_runs.py",
    "runs/test_resume.py",
    "runs/test_streamed_runs.py",
    "test_deployment.py",
    "test_docs.py",
    "test_fuzz.py",
    "test_house.py",
    "test_notebooks.py",
}


def name_of(path: Path) -> str:
    """`blora_pyro.data.audio`, and for a room's `__init__` that of the room."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(("blora_pyro", *(one for one in parts if one != "__init__")))


MODULES = {name_of(path): path for path in HOUSE.rglob("*.py")}


def imports(path: Path) -> list[tuple[str, int]]:
    """Modules of the package that one imports, anywhere in it, also under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(one.name.startswith("blora_pyro") for one in node.names), "use from"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not node.level, "import by the whole name"
        if node.module and node.module.split(".")[0] == "blora_pyro":
            for one in node.names:
                whole = f"{node.module}.{one.name}"
                found.append((whole if whole in MODULES else node.module, node.lineno))
    return found


def test_every_room_has_its_place():
    rooms = {path.relative_to(HOUSE).with_suffix("").parts[0] for path in FILES}
    assert rooms == set(ORDER)


def test_nothing_imports_from_its_right():
    wrong, count = [], 0
    for path in FILES:
        room = ORDER.index(path.relative_to(HOUSE).with_suffix("").parts[0])
        for module, line in imports(path):
            count += 1
            if module != "blora_pyro" and ORDER.index(module.split(".")[1]) > room:
                wrong.append(f"{path}:{line}: {module}")
    assert count > 500
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    # A module may import from its own room's names, which the room's __init__ takes from others.
    graph = {
        name: {one for one, _ in imports(path) if one != "blora_pyro" and one != name}
        for name, path in MODULES.items()
        if path.stem not in ("__init__", "__main__")
    }
    try:
        order = [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
    assert len(order) >= len(graph)


def test_every_module_has_a_test_of_its_name_and_every_test_a_module():
    modules = {
        f"{path.relative_to(HOUSE).parent / f'test_{path.stem}.py'}".removeprefix("./")
        for path in FILES
    }
    tests = {
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("test_*.py")
        if path.relative_to(TESTS).parts[0] not in ("recipes", "experiments")
    }
    assert modules <= tests, f"without a test: {sorted(modules - tests)}"
    assert tests - modules <= ACROSS, f"without a module: {sorted(tests - modules - ACROSS)}"


def test_every_public_name_is_there():
    assert all(hasattr(blora_pyro, name) for name in blora_pyro.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        blora_pyro.fitt  # noqa: B018


def test_a_name_of_the_data_is_that_of_the_module_it_is_said_to_be_of():
    from blora_pyro import data

    (block,) = [
        one for one in ast.parse(Path(data.__file__).read_text()).body if type(one) is ast.If
    ]
    for node in block.body:
        module = importlib.import_module(node.module)
        for one in node.names:
            assert getattr(data, one.name) is getattr(module, one.name), one.name
