"""Drawing pictures: seeds, files, metadata, checkpoints, LoRA files, several processes, what was drawn before."""

import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import PROMPTS, tiny_config

from srpo_core import sampling
from srpo_core.assemble import assemble
from srpo_core.cli import main
from srpo_core.config import ConfigError, ParallelConfig
from srpo_core.description import make_config
from srpo_core.devices import divided_world
from srpo_core.errors import NotFiniteError
from srpo_core.files import fingerprint
from srpo_core.interfaces import Components
from srpo_core.parallel import World
from srpo_core.picture_files import INDEX, SHEET, parameters, plan, prompt_of, read_record
from srpo_core.sampling import ChosenLora, SampleSettings, chosen_checkpoint, sample
from srpo_core.score_files import find_pictures

ROOT = Path(__file__).resolve().parent.parent


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def draw(config, folder, checkpoint=None, **options):
    return sample(config, checkpoint, SampleSettings.of(config, steps=2), folder, **options).files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run with checkpoints of steps 2 and 4."""
    config = tiny_config(tmp_path_factory.mktemp("run") / "run", output__keep_checkpoints=2, optim__lr=0.02)
    return config, assemble(config).train().run_dir


def test_a_picture_depends_on_prompt_and_seed_alone(tmp_path):
    config = tiny_config(tmp_path)
    prompts = ["a red cat", "a blue dog", "a house"]
    one = draw(config, tmp_path / "one", prompts=prompts, seeds=range(2), batch_size=1)
    four = draw(config, tmp_path / "four", prompts=prompts, seeds=range(2), batch_size=4)
    alone = draw(config, tmp_path / "alone", prompts=["a blue dog"], seeds=[1], batch_size=4)
    assert [path.name for path in one] == [path.name for path in four]
    for left, right in zip(one, four, strict=True):
        assert abs(pixels(left) - pixels(right)).max() <= 1  # sums of other batches round otherwise
    assert abs(pixels(alone[0]) - pixels(one[3])).max() <= 1
    assert abs(pixels(one[0]) - pixels(one[1])).max() > 1
    again = draw(config, tmp_path / "again", prompts=prompts, seeds=range(2), batch_size=4)
    assert all(left.read_bytes() == right.read_bytes() for left, right in zip(four, again, strict=True))


def test_files_say_how_they_were_made(tmp_path):
    prompt = 'größe, "100%" [bold]/../'
    config = tiny_config(tmp_path, data__height=16, data__width=24)
    (path,) = draw(config, tmp_path / "out", prompts=[prompt], seeds=[7])
    assert path.parent == tmp_path / "out"
    with Image.open(path) as image:
        assert image.size == (24, 16)
        record, said = json.loads(image.info["srpo"]), image.info["parameters"]
        assert prompt_of(image.info) == prompt
    assert (record["prompt"], record["seed"], record["checkpoint"], record["steps"]) == (prompt, 7, "base", 2)
    assert (record["guidance"], record["width"], record["height"]) == (3.5, 24, 16)
    assert record["sigmas"] == [1.0, 0.75, 0.0]  # 3t / (1 + 2t) at 1, 1/2 and 0
    assert torch.__version__.startswith(record["made_with"]["versions"]["torch"].split("+")[0])
    assert said.startswith(f"{prompt}\nSteps: 2, Sampler: Euler,") and "Seed: 7, Size: 24x16, " in said
    assert [picture.prompt for picture in find_pictures([tmp_path / "out"])] == [prompt]  # the sheet is no picture


def test_names_of_files_are_plain(tmp_path):
    pictures = plan(["Größe, 2 Katzen!", "猫"], [7], tmp_path)
    assert [picture.path.name for picture in pictures] == ["000-grosse-2-katzen-7.png", "001-7.png"]


def test_parameters_of_other_tools_name_the_prompt_too():
    a1111 = "a cat\non a mat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 1"
    assert prompt_of({"parameters": a1111}) == "a cat\non a mat"
    assert prompt_of({"parameters": "a cat\nSteps: 20, Seed: 1"}) == "a cat"
    assert prompt_of({"prompt": " plain "}) == "plain"
    assert prompt_of({"srpo": '{"prompt": "own"}', "prompt": "{}"}) == "own"
    assert prompt_of({"srpo": "torn {"}) == prompt_of({}) == ""


def test_a_comma_in_parameters_is_quoted():
    record = {"prompt": "p", "seed": 1, "steps": 2, "guidance": 3.5, "shift": 3.0, "width": 8, "height": 8}
    record |= {"model": {"family": "flux", "transformer": "a,b"}, "checkpoint": "base"}
    record["loras"] = [{"file": "x", "strength": 1.0}, {"file": "y", "strength": 0.5}]
    assert 'Model: "a,b", Checkpoint: base, Lora: "x:1, y:0.5"' in parameters(record)


def test_an_unusable_folder_is_found_before_the_model_loads(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*can't be written to"):
        draw(tiny_config(tmp_path), tmp_path / "file" / "out", prompts=["a"])


def test_pictures_of_the_same_settings_are_kept_and_others_refused(tmp_path):
    config, out = tiny_config(tmp_path), tmp_path / "out"
    first = sample(config, None, SampleSettings.of(config, steps=2), out, prompts=["a", "b", "c"], batch_size=2)
    assert (first.drawn, first.complete) == (3, True)
    before = {path: path.read_bytes() for path in first.files}
    first.files[1].unlink()
    first.files[2].unlink()
    again = sample(config, None, SampleSettings.of(config, steps=2), out, prompts=["a", "b", "c"], batch_size=2)
    assert again.drawn == 3  # a's batch was drawn with it, so that b's sums round as before
    assert {path: path.read_bytes() for path in again.files} == before
    kept = sample(config, None, SampleSettings.of(config, steps=2), out, prompts=["a", "b", "c"], batch_size=2)
    assert (kept.drawn, kept.complete) == (0, True)
    with pytest.raises(ConfigError, match=r"000-a-0.png and 2 more exist already, made with other settings"):
        sample(config, None, SampleSettings.of(config, steps=3), out, prompts=["a", "b", "c"])
    assert {path: path.read_bytes() for path in again.files} == before
    anew = sample(config, None, SampleSettings.of(config, steps=3), out, prompts=["a", "b", "c"], overwrite=True)
    assert anew.drawn == 3 and read_record(anew.files[0])["steps"] == 3
    anew.files[0].write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"000-a-0.png exists already"):
        sample(config, None, SampleSettings.of(config, steps=3), out, prompts=["a", "b", "c"])
    assert sorted(out.glob(".tmp*")) == []


def test_the_text_encoder_is_gone_before_the_transformer_is_there(tmp_path, monkeypatch):
    class Lazy(Components):
        """The tiny family, each part loaded when it is first read, as a large family's are."""

        def __init__(self, parts):
            self.parts, self.measures, self.prompts, self.read = parts, {}, {}, []

        @cached_property
        def text_encoder(self):
            self.read.append("text encoder")
            return self.parts.text_encoder

        @cached_property
        def flow(self):
            self.read.append("flow")
            assert "text_encoder" not in self.__dict__
            return self.parts.flow

        @cached_property
        def autoencoder(self):
            return self.parts.autoencoder

        def outline(self):
            return self.parts.flow

    lazy = Lazy(tiny.load(tiny_config(tmp_path).model, "cpu"))
    monkeypatch.setattr(sampling, "load_model", lambda config, device: lazy)
    (path,) = draw(tiny_config(tmp_path), tmp_path / "lazy", prompts=["a"])
    assert lazy.read == ["text encoder", "flow"]
    lazy.read.clear()
    draw(tiny_config(tmp_path), tmp_path / "lazy", prompts=["a"])
    assert lazy.read == []  # nothing to draw, nothing loaded
    monkeypatch.undo()
    (eager,) = draw(tiny_config(tmp_path), tmp_path / "eager", prompts=["a"])
    assert path.read_bytes() == eager.read_bytes()


def test_index_and_sheet_stand_beside_the_pictures(tmp_path):
    config, out = tiny_config(tmp_path), tmp_path / "out"
    draw(config, out, prompts=["a", "b"], seeds=[3, 4])
    draw(config, out, prompts=["a"], seeds=[5])  # more pictures in the same folder join its index
    lines = [json.loads(line) for line in (out / INDEX).read_text().splitlines()]
    assert [(line["file"], line["prompt"], line["seed"]) for line in lines] == [
        ("000-a-3.png", "a", 3), ("000-a-4.png", "a", 4), ("000-a-5.png", "a", 5),
        ("001-b-3.png", "b", 3), ("001-b-4.png", "b", 4),
    ]  # fmt: skip
    with Image.open(out / SHEET) as sheet:
        assert sheet.size[0] > 192


def test_held_out_prompts_are_the_default(tmp_path):
    files = draw(tiny_config(tmp_path), tmp_path / "out")
    with Image.open(files[0]) as image:
        assert prompt_of(image.info) == PROMPTS["eval"][0]
    assert len(files) == len(PROMPTS["eval"])


def test_prompts_from_a_file_and_bad_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n\nb\n")
    config = tiny_config(tmp_path)
    assert len(draw(config, tmp_path / "out", prompts_file=str(tmp_path / "prompts.txt"))) == 2
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        draw(config, tmp_path / "out2", prompts_file=str(tmp_path / "empty.txt"))
    with pytest.raises(ConfigError, match="--prompt is empty"):
        draw(config, tmp_path / "out2", prompts=[" "])


def test_checkpoints_by_name(run, tmp_path, monkeypatch):
    config, folder = run
    assert chosen_checkpoint(folder, None).name == "step-000004"
    assert chosen_checkpoint(folder, "last").name == "step-000004"
    assert chosen_checkpoint(folder, "2").name == "step-000002"
    assert chosen_checkpoint(folder, "base") is None
    assert chosen_checkpoint(None, None) is None
    for name in ("3", "newest"):
        with pytest.raises(ConfigError, match="checkpoint"):
            chosen_checkpoint(folder, name)
    with pytest.raises(ConfigError, match="a preset has no checkpoints"):
        chosen_checkpoint(None, "last")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        chosen_checkpoint(tmp_path, None)
    (base,) = draw(config, tmp_path / "base", prompts=["a"])
    (trained,) = draw(config, tmp_path / "trained", chosen_checkpoint(folder, "last"), prompts=["a"])
    assert abs(pixels(base) - pixels(trained)).max() > 0
    assert read_record(trained)["checkpoint"] == f"{folder.name}/step-000004"
    monkeypatch.chdir(folder)
    again = sample(
        config, chosen_checkpoint(Path("."), "last"), SampleSettings.of(config, steps=2), trained.parent, prompts=["a"]
    )
    assert again.drawn == 0  # from inside the run's folder it is the same checkpoint


def lora_file(path, layer="x_embedder", rank=2, width=16, alpha=4.0):
    down, up = torch.randn(rank, width), torch.randn(32, rank)
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(alpha)}
    save_file({f"transformer.{layer}.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


def test_loras_are_added_with_their_strengths(tmp_path):
    config = tiny_config(tmp_path)
    one, two = (lora_file(tmp_path / name) for name in ("one.safetensors", "two.safetensors"))
    (base,) = draw(config, tmp_path / "base", prompts=["a"])
    (none,) = draw(config, tmp_path / "none", prompts=["a"], loras=[ChosenLora(one, 0.0)])
    (both,) = draw(config, tmp_path / "both", prompts=["a"], loras=[ChosenLora(one), ChosenLora(two, -0.5)])
    (other,) = draw(config, tmp_path / "other", prompts=["a"], loras=[ChosenLora(two, -0.5), ChosenLora(one)])
    assert (pixels(base) == pixels(none)).all()
    assert abs(pixels(base) - pixels(both)).max() > 1
    assert abs(pixels(both) - pixels(other)).max() <= 1
    assert read_record(both)["loras"][1] == {"file": "two.safetensors", "strength": -0.5}
    assert read_record(both)["fingerprints"]["lora 0"] == fingerprint(one)


def test_a_lora_of_another_model_is_refused_before_anything_is_drawn(tmp_path):
    path = lora_file(tmp_path / "lora.safetensors", width=12)
    with pytest.raises(ConfigError, match=r"is for another model.*x_embedder"):
        draw(tiny_config(tmp_path), tmp_path / "out", prompts=["a"], loras=[ChosenLora(path)])
    with pytest.raises(ConfigError, match=r"none\.safetensors"):
        draw(tiny_config(tmp_path), tmp_path / "out", prompts=["a"], loras=[ChosenLora(tmp_path / "none.safetensors")])
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_finite_are_not_written(tmp_path):
    path = lora_file(tmp_path / "lora.safetensors")
    with pytest.raises(NotFiniteError, match="nothing is written"):
        draw(tiny_config(tmp_path), tmp_path / "out", prompts=["a"], loras=[ChosenLora(path, 1e38)])
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_lora_argument_may_carry_a_strength():
    assert ChosenLora.parse("a.safetensors") == ChosenLora(Path("a.safetensors"), 1.0)
    assert ChosenLora.parse("dir/a.safetensors:0.8") == ChosenLora(Path("dir/a.safetensors"), 0.8)
    assert ChosenLora.parse("C:\\a.safetensors") == ChosenLora(Path("C:\\a.safetensors"), 1.0)


def test_steps_are_those_of_finished_pictures(tmp_path):
    flux = make_config({"model": {"family": "flux"}, "output": {"preview_steps": 25}})
    assert SampleSettings.of(flux).steps == 50
    assert SampleSettings.of(flux).guidance == 3.5
    assert SampleSettings.of(flux, steps=8, guidance=2.0).steps == 8
    assert SampleSettings.of(tiny_config(tmp_path)).steps == 2  # output.preview_steps


def test_a_size_that_the_model_cannot_take_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.height=\d+, data.width=25"):
        draw(tiny_config(tmp_path, data__width=25), tmp_path / "out", prompts=["a"])


def test_a_fingerprint_tells_weights_apart(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    data = np.random.default_rng(0).bytes(5_000_000)
    a.write_bytes(data)
    b.write_bytes(data)
    assert fingerprint(a) == fingerprint(b)
    b.write_bytes(data[:-1] + b"x")
    assert fingerprint(a) != fingerprint(b)
    b.write_bytes(data[:-1])
    assert fingerprint(a) != fingerprint(b)
    assert len({fingerprint(a), fingerprint(b), fingerprint(tmp_path)}) == 3


def test_parts_of_several_processes_make_up_the_whole():
    items = list(range(11))
    parts = [World(rank, 3, torch.device("cpu")).share(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_reads_its_place_from_the_launcher(monkeypatch):
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    world = divided_world(ParallelConfig(device="cpu"))
    assert (world.rank, world.size, world.is_main) == (2, 3, False)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="RANK=3, WORLD_SIZE=3"):
        divided_world(ParallelConfig(device="cpu"))
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(ConfigError, match="RANK='two'"):
        divided_world(ParallelConfig(device="cpu"))


def torchrun(processes, *arguments):
    """The command under torchrun's launcher with so many processes on the CPU; (exit code, output)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "srpo_core" / "__main__.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_two_processes_draw_the_same_bytes_as_one(tmp_path):
    config = tiny_config(tmp_path / "run")
    (tmp_path / "run.json").write_text(config.model_dump_json())
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(5)))
    asked = ["sample", tmp_path / "run.json", "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--count", 2]
    code, out = torchrun(2, *asked, "--out", tmp_path / "two")
    assert code == 0, out
    assert out.count("10 pictures in") == 1 and out.count("drawing (process 1 of 2): 6 to do") == 1
    one = draw(config, tmp_path / "one", prompts_file=str(tmp_path / "prompts.txt"), seeds=range(2))
    assert len(one) == 10
    for path in one:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for name in (INDEX, SHEET):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_error_names_its_process(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text(tiny_config(tmp_path / "run").model_dump_json())
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000-a-0.png").write_bytes(b"mine")
    asked = ["sample", str(tmp_path / "run.json"), "--prompt", "a", "--prompt", "b", "--out", str(tmp_path / "out")]
    assert main(asked) == 2
    told = capsys.readouterr()
    assert "srpo, rank 1 of 2: " in told.err and "000-a-0.png exists already" in told.err
    assert (
        main([*asked[:2], "--prompt", "c", "--prompt", "b", "--batch-size", "1", "--out", str(tmp_path / "new")]) == 0
    )
    assert [path.name for path in (tmp_path / "new").glob("*.png")] == ["001-b-0.png"]  # its own share
    assert capsys.readouterr().out == ""  # and not a word: rank 0 tells of progress, the last one of the end


def test_an_exported_lora_draws_the_same_as_its_checkpoint(tmp_path):
    from srpo_core.export import export_run

    config = tiny_config(tmp_path / "run", lora={"rank": 2, "alpha": 32}, optim__lr=0.02)
    folder = assemble(config).train().run_dir
    lora = export_run(folder, tmp_path / "lora.safetensors")
    (trained,) = draw(config, tmp_path / "a", chosen_checkpoint(folder, None), prompts=["a"])
    (merged,) = draw(config, tmp_path / "b", prompts=["a"], loras=[ChosenLora(lora)])
    (base,) = draw(config, tmp_path / "c", prompts=["a"])
    assert abs(pixels(trained) - pixels(merged)).max() <= 1
    assert abs(pixels(base) - pixels(merged)).max() > 1
