import importlib
import inspect
from pathlib import Path

import pytest

from blora_pyro.errors import UserError
from blora_pyro.families import (
    DEPENDENT_ROWS,
    FAMILIES,
    GUIDES,
    check_code,
    check_hashes,
    code_hashes,
    code_path,
    is_code,
)


@pytest.mark.parametrize("name", GUIDES)
def test_every_name_has_a_module_with_a_guide_and_a_family_also_a_prior(name):
    module = importlib.import_module(GUIDES[name])
    assert inspect.isclass(module.Guide)
    assert name not in FAMILIES or inspect.isclass(module.Prior)


def test_families_whose_rows_depend_on_one_another_are_families():
    assert set(DEPENDENT_ROWS) <= set(FAMILIES)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "mine.py",
            "a/mine.py",
            Path("mine.py"),
            "mine.py/",
            "./mine.py",
            "mine.PY",
            "mine",
            "os",
        ),
        *("blora_pyro.guides.normal", "https://a.b/mine.py", "file:mine.py", "", "NORMAL", ["a"]),
    ],
)
def test_whatever_is_no_name_of_a_built_in_family_or_guide_is_code(name):
    assert is_code(name)
    with pytest.raises(UserError, match=r"^the run names code as guide, .*; name it$"):
        check_code({"prior": "normal", "guide": name}, [], "the run", "name it")


def test_a_built_in_name_is_no_code():
    for name in (*GUIDES, "previous-posterior", "none", None):
        assert not is_code(name)
        check_code({"prior": name}, [], "the run", "name it")


def test_code_is_found_by_its_resolved_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("")
    Path("link").symlink_to(file)
    Path("link.py").symlink_to("text.txt")
    Path("circle.py").symlink_to("circle.py")
    Path("text.txt").write_text("")
    Path("folder.py").mkdir()
    for name in ("mine.py", "mine.py/", "./mine.py", "folder.py/../mine.py", "link", file):
        assert code_path(name) == file
        check_code({"prior": name}, ["mine.py"], "the run", "name it")  # it is the very file
    for name in ("text.txt", "link.py", "circle.py", "folder.py", "none.py", "a\0b.py", "normal"):
        assert code_path(name) is None


def test_a_file_that_has_changed_is_refused_by_its_hash(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("one")
    given = {"prior": str(file), "guide": "point"}
    known = code_hashes(given)
    assert known.keys() == {"prior"}
    check_hashes(given, known, "the run")
    check_hashes(given, None, "a run of an earlier version")
    file.write_text("two")
    for hashes in (known, {}, {"prior": 3}):
        with pytest.raises(UserError, match="is not the file that the run was fitted with"):
            check_hashes(given, hashes, "the run")
    with pytest.raises(UserError, match="code_sha256 is 'x'"):
        check_hashes(given, "x", "the run")
