"""The public names, which `spd/__init__.py` lists three times: for type checkers, for importing late, for `*`."""

import ast
import inspect
from importlib import import_module

import pytest

import spd


def imported_for_type_checkers() -> dict[str, str]:
    """Each name of the TYPE_CHECKING block, and the module from which it is imported."""
    tree = ast.parse(inspect.getsource(spd))
    (block,) = (each for each in tree.body if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING")
    return {
        alias.name: str(each.module) for each in block.body if isinstance(each, ast.ImportFrom) for alias in each.names
    }


def test_the_three_lists_agree():
    assert imported_for_type_checkers() == spd._HOME
    assert sorted(spd.__all__) == sorted(spd._HOME)


@pytest.mark.parametrize("name", spd.__all__)
def test_a_name_is_what_its_home_defines(name):
    assert getattr(spd, name) is getattr(import_module(imported_for_type_checkers()[name]), name)


def test_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'calibrat'"):
        spd.calibrat  # noqa: B018
