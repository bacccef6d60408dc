"""One way through the house: nothing to the left imports from the right."""

import ast
from pathlib import Path

import pytest

import blora_pyro

HOUSE = Path(blora_pyro.__file__).parent
ORDER = (  # of the rooms and of the files beside them, as CONTRIBUTING.md tells it
    *("errors", "files", "hub", "launched", "families", "languages", "sources", "tables"),
    *("plotting", "declarations", "options"),
    *("data", "metrics", "low_rank", "adapters", "models", "guides", "fitting"),
    *("posterior", "diagnostics", "transcription", "evaluation"),
    *("runs", "studies", "sweeps", "comparison", "publishing", "cli"),
)
FILES = sorted(path for path in HOUSE.rglob("*.py") if not path.stem.startswith("__main"))


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def imported(path: Path):
    """Rooms, and lines; what is for the type checker alone counts for nothing."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            assert not any(one.name.startswith("blora_pyro") for one in node.names), "use from"
        assert not isinstance(node, ast.ImportFrom) or not node.level, "import by the whole name"
        if isinstance(node, ast.ImportFrom) and node.module == "blora_pyro":
            yield from ((one.name, node.lineno) for one in node.names if one.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("blora_pyro."):
            yield node.module.split(".")[1], node.lineno


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms == set(ORDER)


def test_nothing_imports_from_its_right():
    found = [(path, *one) for path in FILES for one in imported(path)]
    wrong = [
        f"{path}:{line}: {name}"
        for path, name, line in found
        if room_of(path) != "__init__" and ORDER.index(name) > ORDER.index(room_of(path))
    ]
    assert len(found) > 500
    assert not wrong


def test_every_public_name_is_there():
    assert all(hasattr(blora_pyro, name) for name in blora_pyro.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        blora_pyro.fitt  # noqa: B018
