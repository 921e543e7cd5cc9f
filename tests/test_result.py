"""A run's result: written when it ends, as its export would be, and in no other file's place."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from srpo_core import result
from srpo_core.assemble import train_run
from srpo_core.config import ConfigError
from srpo_core.export import export_run
from srpo_core.run_folder import load_folder


def config_of(tmp_path, steps=2, name="look.safetensors", **settings):
    settings = {"lora": {"rank": 2}, "output__result": str(tmp_path / "loras" / name), **settings}
    return tiny_config(
        tmp_path / "run", optim__steps=steps, output__preview_every=0, output__keep_checkpoints=9, **settings
    )


def same(path, other):
    one, two = load_file(path), load_file(other)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_written_when_the_run_ends_and_again_with_its_step_when_it_went_on(tmp_path):
    config = config_of(tmp_path)
    path = tmp_path / "loras" / "look.safetensors"
    assert result.check(config) == path
    assert result.read(tmp_path / "run") is None
    train_run(config)
    assert same(path, export_run(tmp_path / "run", tmp_path / "again.safetensors"))
    assert load_file(path)[next(iter(load_file(path)))].dtype == torch.float32
    record = result.read(tmp_path / "run")
    assert (record["path"], record["step"], record["error"]) == (str(path), 2, "")
    first = path.read_bytes()

    train_run(config, resume=True)  # nothing left to do: the same file
    assert result.read(tmp_path / "run")["path"] == str(path)
    assert list(path.parent.iterdir()) == [path]

    longer = config_of(tmp_path, steps=4)
    second = tmp_path / "loras" / "look-000004.safetensors"
    assert result.check(longer) == second
    train_run(longer, resume=True)
    assert path.read_bytes() == first
    assert same(second, export_run(tmp_path / "run", tmp_path / "later.safetensors"))
    assert result.read(tmp_path / "run")["path"] == str(second)
    assert result.files(tmp_path / "run") == {path: 2, second: 4}


def test_a_full_run_gives_its_transformer(tmp_path):
    config = config_of(tmp_path, lora={"rank": 0})
    train_run(config)
    assert same(tmp_path / "loras" / "look.safetensors", export_run(tmp_path / "run", tmp_path / "o.safetensors"))


def test_a_file_that_is_there_stays(tmp_path):
    config = config_of(tmp_path)
    path = tmp_path / "loras" / "look.safetensors"
    path.parent.mkdir()
    save_file({"mine": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match="is there already and not of this run") as error:
        result.check(config)
    assert "output.result" in str(error.value)
    train_run(config)  # it came while the run was at work, say
    assert load_file(path).keys() == {"mine"}
    assert result.read(tmp_path / "run")["path"] == str(tmp_path / "loras" / "look-2.safetensors")
    assert (tmp_path / "loras" / "look-2.safetensors").is_file()


def test_a_step_that_is_taken(tmp_path):
    train_run(config_of(tmp_path))
    other = tmp_path / "loras" / "look-000004.safetensors"
    other.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="look-000004"):
        result.check(config_of(tmp_path, steps=4))


@pytest.mark.parametrize(("name", "words"), [("look.pt", "ends in .safetensors"), ("look", "ends in .safetensors")])
def test_a_name_that_is_none(tmp_path, name, words):
    with pytest.raises(ConfigError, match=words):
        result.check(config_of(tmp_path, name=name))
    assert not (tmp_path / "loras").exists()


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "loras").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        result.check(config_of(tmp_path))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_that_is_read_only(tmp_path):
    (tmp_path / "loras").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="can't be written to"):
        result.check(config_of(tmp_path))


def test_one_that_fails_leaves_the_run_finished(tmp_path, capsys):
    config = config_of(tmp_path)
    (tmp_path / "loras").write_text("")  # a file where the folder should be
    assert train_run(config).finished
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "finished"
    record = result.read(tmp_path / "run")
    assert record["path"] is None
    assert "could not be written" in record["error"]
    assert "srpo export" in capsys.readouterr().out


def test_no_result_is_wanted(tmp_path):
    config = config_of(tmp_path)
    config.output.result = None
    assert result.check(config) is None
    train_run(config)
    assert result.read(tmp_path / "run") is None


def test_the_newest_checkpoint_is_saved_on_demand(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match="no run"):
        result.save_now(tmp_path / "run")
    train_run(config)
    record = result.read(tmp_path / "run")
    assert result.save_now(tmp_path / "run") == tmp_path / "loras" / "look.safetensors"  # this step's file is there
    (tmp_path / "loras" / "look.safetensors").unlink()
    saved = result.save_now(tmp_path / "run")
    assert saved == tmp_path / "loras" / "look-000002.safetensors"
    assert same(saved, export_run(tmp_path / "run", tmp_path / "o.safetensors"))
    assert result.save_now(tmp_path / "run") == saved
    assert {key: value for key, value in result.read(tmp_path / "run").items() if key != "files"} == {
        key: value for key, value in record.items() if key != "files"
    }
    assert list(saved.parent.iterdir()) == [saved]


def test_a_file_in_the_run_s_folder_moves_with_it(tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    train_run(config_of(tmp_path, output__result=str(folder / "look.safetensors")))
    folder.rename(moved)
    assert result.read(moved)["path"] == str(moved / "look.safetensors")
    assert result.save_now(moved) == moved / "look.safetensors"
    config = load_folder(moved, ["optim.steps=4"])
    assert result.check(config) == moved / "look-000004.safetensors"


def test_saving_may_be_refused(tmp_path):
    train_run(config_of(tmp_path))

    def refuse(config):
        raise ConfigError(f"not {config.output.result}")

    with pytest.raises(ConfigError, match=r"not .*look"):
        result.save_now(tmp_path / "run", refuse)


def test_a_run_without_a_result_saves_into_its_own_folder(tmp_path):
    config = config_of(tmp_path)
    config.output.result = None
    train_run(config)
    assert result.save_now(tmp_path / "run") == tmp_path / "run" / "export" / "run-000002.safetensors"
