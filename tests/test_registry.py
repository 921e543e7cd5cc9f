"""Tables of names, and users' own functions."""

import pytest

from srpo_core.config import ConfigError
from srpo_core.models import MODELS
from srpo_core.registry import resolve
from srpo_core.rewards import REWARDS

TABLE = {"hpsv2": "math:sqrt", "clip": "math:no_such", "broken": "no_such_package.module:load"}


def test_a_name_stands_for_its_function():
    import math

    assert resolve(TABLE, "reward", "hpsv2") is math.sqrt


def test_a_users_own_function_needs_no_table():
    import json

    assert resolve(TABLE, "reward", "json:dumps") is json.dumps


def test_a_users_own_function_may_be_in_any_file(tmp_path):
    code = "from dataclasses import dataclass\n\n@dataclass\nclass Thing:\n    size: 'int' = 3\n\nload = Thing\n"
    path = tmp_path / "mine.py"
    path.write_text(code)
    load = resolve(TABLE, "reward", f"{path}:load")
    assert load().size == 3
    assert resolve(TABLE, "reward", f"{path}:load") is load  # run once
    (tmp_path / "broken.py").write_text("from nothing_at_all import more")
    with pytest.raises(ConfigError, match=r"broken.py:load' can't be imported: No module named 'nothing_at_all'"):
        resolve(TABLE, "reward", f"{tmp_path / 'broken.py'}:load")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def load(config, device)\n    pass\n", r"can't be imported: expected ':' \(own.py, line 1\)"),
        ("\nimport math\nmath.no_such\n", r"AttributeError: module 'math' has no .*no_such.* \(.*own.py, line 3\)"),
        ("load = 3\n", r"has no 'load'"),
    ],
)
def test_a_users_own_file_that_fails_is_named_with_the_line(tmp_path, code, message):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(ConfigError, match=rf"reward '.*own.py:load'.*{message}"):
        resolve(TABLE, "reward", f"{tmp_path / 'own.py'}:load")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hps", r"unknown reward 'hps'; did you mean 'hpsv2'\? \(choices: hpsv2, clip, broken\); your own is file.py:"),
        ("clip", r"reward 'clip': math has no 'no_such'"),
        ("broken", r"reward 'broken' can't be imported: No module named 'no_such_package'"),
        ("not_there:load", r"reward 'not_there:load' can't be imported"),
        ("json:nothing", r"reward 'json:nothing': json has no 'nothing'"),
        (":load", r"reward ':load'"),
        ("json:", r"reward 'json:'"),
        ("no_such.py:load", r"reward 'no_such.py:load' can't be imported: .*No such file"),
    ],
)
def test_what_cant_be_resolved_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TABLE, "reward", name)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in (MODELS, REWARDS) for name in table])
def test_every_entry_of_the_tables_exists(table, name):
    assert callable(resolve(table, "entry", name))
