import importlib
import inspect
from pathlib import Path

import pytest

from blora_pyro.families import DEPENDENT_ROWS, FAMILIES, GUIDES, is_code


@pytest.mark.parametrize("name", GUIDES)
def test_every_name_has_a_module_with_a_guide_and_a_family_also_a_prior(name):
    module = importlib.import_module(GUIDES[name])
    assert inspect.isclass(module.Guide)
    assert name not in FAMILIES or inspect.isclass(module.Prior)


def test_families_whose_rows_depend_on_one_another_are_families():
    assert set(DEPENDENT_ROWS) <= set(FAMILIES)


def test_code_is_the_path_of_a_python_file():
    for name in ("mine.py", "a/mine.py", Path("mine.py"), "mine.py/", "./mine.py"):
        assert is_code(name)
    for name in ("normal", "mine.python", "py", None, ""):
        assert not is_code(name)
