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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hps", r"unknown reward 'hps'; did you mean 'hpsv2'\? \(choices: hpsv2, clip, broken\); your own is written"),
        ("clip", r"reward 'clip': math has no 'no_such'"),
        ("broken", r"reward 'broken' can't be imported: No module named 'no_such_package'"),
        ("not_there:load", r"reward 'not_there:load' can't be imported"),
        ("json:nothing", r"reward 'json:nothing': json has no 'nothing'"),
        (":load", r"reward ':load'"),
        ("json:", r"reward 'json:'"),
    ],
)
def test_what_cant_be_resolved_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TABLE, "reward", name)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in (MODELS, REWARDS) for name in table])
def test_every_entry_of_the_tables_exists(table, name):
    assert callable(resolve(table, "entry", name))
