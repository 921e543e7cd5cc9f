"""Downloads from a hub on localhost: whole, broken and resumed, damaged, gated, refused; into both kinds of place."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Hub, git_sha1, sha256
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from srpo_core import cli, download, hub, places
from srpo_core.catalogue import CATALOGUE
from srpo_core.config import ConfigError

TOKEN = "hf_secretsecretsecret"
HPS = "HPS_v2.1_compressed.pt"
FLUX = "black-forest-labs/FLUX.1-dev"
LARGE = hashlib.sha256(b"seed").digest() * 10_000  # 320 kB
FLUX_FILES = {
    "model_index.json": b"{}",
    "flux1-dev.safetensors": LARGE + b"single",
    "transformer/diffusion_pytorch_model-00001-of-00001.safetensors": LARGE,
    **{f"{folder}/config.json": b'{"a": 1}' for folder in ("transformer", "text_encoder", "text_encoder_2", "vae")},
    **{f"{folder}/x.json": folder.encode() for folder in ("tokenizer", "tokenizer_2", "scheduler")},
    "README.md": b"not wanted",
}


@pytest.fixture
def server():
    with Hub() as running:
        running.add("xswu/HPSv2", {HPS: LARGE, "README.md": b"x"}, card={"license": "apache-2.0"})
        pick = {"model.safetensors": LARGE, "config.json": b"{}", "vocab.json": b'{"v": 1}', "merges.txt": b"m"}
        running.add("yuvalkirstain/PickScore_v1", {**pick, "pytorch_model.bin": LARGE + b"pickle"})
        licence = {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}
        running.add(FLUX, FLUX_FILES, gated=True, card=licence)
        yield running


@pytest.fixture
def home(server, monkeypatch, tmp_path):
    """This process asks the server, without a login, with a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "COMFYUI_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_PAUSE", 0.0)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what arrives is written in such pieces
    return tmp_path


@pytest.fixture
def comfyui(home):
    (home / "ComfyUI" / "models").mkdir(parents=True)
    return home / "ComfyUI"


def srpo(*words):
    return cli.main(["download", *map(str, words)])


def test_into_the_cache(server, home, capsys):
    assert srpo("hpsv2", "--yes") == 0
    text = capsys.readouterr().out
    assert "Apache-2.0" in text
    assert "320 kB" in text
    assert server.url in text
    cached = try_to_load_from_cache("xswu/HPSv2", HPS, cache_dir=constants.HF_HUB_CACHE)
    assert Path(cached).read_bytes() == LARGE
    assert places.find("hpsv2") == Path(cached)
    assert f"reward.path={cached}" in text
    assert not list(home.rglob("*.part")) + list(home.rglob("*.lock"))
    asked = len(server.bodies())
    found = hf_hub_download("xswu/HPSv2", HPS, cache_dir=constants.HF_HUB_CACHE, endpoint=server.url)
    assert (found, len(server.bodies())) == (cached, asked)  # the hub's own client takes it for its own


def test_again_nothing_is_fetched(server, home, capsys):
    assert srpo("hpsv2", "--yes") == 0
    asked = len(server.bodies())
    assert srpo("hpsv2") == 0  # nothing to ask either
    assert "already there" in capsys.readouterr().out
    assert len(server.bodies()) == asked == 1


def test_a_folder_into_comfyui(server, comfyui, capsys):
    assert srpo("pickscore", "hpsv2", "--yes", "--to", "comfyui", comfyui) == 0
    folder = comfyui / "models" / "srpo_rewards" / "PickScore_v1"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "vocab.json", "merges.txt"}
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert (comfyui / "models" / "srpo_rewards" / HPS).read_bytes() == LARGE
    assert f"reward.path={folder}\n" in capsys.readouterr().out


def test_from_the_cache_into_comfyui(server, comfyui):
    assert srpo("hpsv2", "--yes") == 0
    assert srpo("hpsv2", "--yes", "--to", "comfyui", comfyui) == 0
    assert (comfyui / "models" / "srpo_rewards" / HPS).read_bytes() == LARGE
    assert len(server.bodies()) == 1


def test_comfyui_is_found_by_the_environment(server, comfyui, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert srpo("hpsv2", "--yes", "--to", "comfyui") == 0
    assert places.find("hpsv2") == comfyui / "models" / "srpo_rewards" / HPS
    moved = comfyui / "models" / "unet"
    (moved / "flux1-dev.safetensors").parent.mkdir()
    (moved / "flux1-dev.safetensors").write_bytes(b"x")
    assert places.find("flux") == moved / "flux1-dev.safetensors"  # the folder's older name


def test_other_folders_of_comfyui(comfyui, home, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    elsewhere = home / "elsewhere" / "encoders"
    elsewhere.mkdir(parents=True)
    (elsewhere / "clip_l.safetensors").write_bytes(b"x")
    settings = f"a111:\n  base_path: {home / 'elsewhere'}\n  text_encoders: |\n    encoders\n    none\n"
    (comfyui / "extra_model_paths.yaml").write_text(settings)
    assert places.find("clip-l") == elsewhere / "clip_l.safetensors"
    assert places.find("t5") is None


def test_a_broken_connection_goes_on_where_it_broke(server, home):
    server.cuts = [100_000, 50_000]
    assert srpo("hpsv2", "--yes") == 0
    starts = [int((request.range or "bytes=0-")[6:-1]) for request in server.bodies()]
    assert starts == [0, 100_000, 150_000]
    assert places.find("hpsv2").read_bytes() == LARGE


def test_a_killed_download_goes_on_where_it_was(server, home):
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "srpo_core", "download", "hpsv2", "--yes"]
    content = LARGE * 80  # the hub's client writes 10 MB at a time
    server.repos["xswu/HPSv2"].files[HPS] = content
    server.stall_after = 15_000_000
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.DEVNULL)
    blobs = home / "home" / "hub" / "models--xswu--HPSv2" / "blobs"
    until = time.monotonic() + 300
    while time.monotonic() < until and not any(part.stat().st_size for part in blobs.glob(".*.part")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.release.set()
    server.stall_after = None
    arrived = next(blobs.glob(".*.part")).stat().st_size
    assert 0 < arrived <= 15_000_000
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rest of it" in done.stdout
    assert server.bodies()[-1].range == f"bytes={arrived}-"
    assert (blobs / sha256(content)).read_bytes() == content


def test_a_storage_without_ranges_starts_again(server, home):
    server.cuts, server.ranges = [100_000], False
    if not srpo("hpsv2", "--yes"):
        assert places.find("hpsv2").read_bytes() == LARGE
    else:  # older clients append: the checksum finds it, and the next try begins anew
        server.cuts = []
        assert srpo("hpsv2", "--yes") == 0
    assert places.find("hpsv2").read_bytes() == LARGE


def test_giving_up_keeps_what_arrived(server, home, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.cuts = [1000] + [0] * 60
    assert srpo("hpsv2", "--yes") == 1
    error = capsys.readouterr().err
    assert "run the same command again" in error
    assert "1000 bytes" in error
    server.cuts = []
    assert srpo("hpsv2", "--yes") == 0
    assert server.bodies()[-1].range == "bytes=1000-"


def test_damaged_bytes_are_deleted(server, home, capsys):
    server.damage = True
    assert srpo("hpsv2", "--yes") == 1
    assert "arrived damaged" in capsys.readouterr().err
    assert places.find("hpsv2") is None
    assert not [path for path in home.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    server.damage = False
    assert srpo("hpsv2", "--yes") == 0


def test_small_files_are_checked_too(server, home, tmp_path):
    file = hub.RemoteFile("vocab.json", 8, git_sha1(b'{"v": 1}'))
    (tmp_path / "x").write_bytes(b'{"v": 2}')
    with pytest.raises(hub.DownloadError, match="damaged"):
        hub.verify(tmp_path / "x", file)


def test_another_file_than_the_catalogue_knows(server, comfyui, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens[TOKEN] = {FLUX}
    assert srpo("flux", "--yes", "--to", "comfyui", comfyui) == 1
    assert "another flux1-dev.safetensors than the one known here" in capsys.readouterr().err
    assert not server.bodies()


def test_a_gated_model_says_how_to_get_in(server, home, monkeypatch, capsys):
    assert srpo("flux", "--yes") == 1
    error = capsys.readouterr().err
    assert f"{server.url}/{FLUX}" in error
    assert "hf auth login" in error
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert srpo("flux", "--yes") == 1
    error = capsys.readouterr().err
    assert "accept its licence" in error
    assert "the account that the token here belongs to" in error
    assert TOKEN not in error


def test_a_gated_model_with_access(server, home, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens[TOKEN] = {FLUX}
    assert srpo("flux", "--yes") == 0
    text = capsys.readouterr().out
    assert "flux-1-dev-non-commercial-license" in text
    assert TOKEN not in text
    folder = places.snapshot(FLUX)
    assert f"model.path={folder}" in text
    got = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert got == set(FLUX_FILES) - {"flux1-dev.safetensors", "README.md"}
    assert not any(request.authorised for request in server.bodies())  # the storage is another host


@pytest.mark.parametrize("size", [len(LARGE), 10])
def test_what_is_there_is_never_overwritten(server, comfyui, capsys, size):
    place = comfyui / "models" / "srpo_rewards" / HPS
    place.parent.mkdir()
    place.write_bytes(b"y" * size)
    assert srpo("hpsv2", "--yes", "--to", "comfyui", comfyui) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert place.read_bytes() == b"y" * size
    assert not server.bodies()


def test_the_same_file_is_already_there(server, comfyui, capsys):
    place = comfyui / "models" / "srpo_rewards" / HPS
    place.parent.mkdir()
    place.write_bytes(LARGE)
    assert srpo("hpsv2", "--to", "comfyui", comfyui) == 0
    assert "already there" in capsys.readouterr().out
    assert not server.bodies()


def test_a_full_disk_is_noticed_first(server, home, monkeypatch, capsys):
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(LARGE) - 1))
    assert srpo("hpsv2", "--yes") == 1
    assert "no room: 320 kB are to come" in capsys.readouterr().err
    assert not server.bodies()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(LARGE)))
    assert srpo("hpsv2", "--yes") == 0


def test_each_disk_needs_room_for_its_own_part(server, comfyui, monkeypatch):
    """Folders of models may be links to other disks."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == comfyui.stat().st_dev:
        pytest.skip("there is one disk")
    usage = shutil.disk_usage(comfyui)
    full = other.stat().st_dev
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=0 if path.stat().st_dev == full else 10**9)
    )
    (item,) = download.plan(download.choose(["hpsv2"]), comfyui)
    elsewhere = replace(item, target=comfyui / "models" / "vae" / "x")
    download.check_space([elsewhere, item])
    (comfyui / "models" / "srpo_rewards").symlink_to(other)
    with pytest.raises(hub.DownloadError, match=r"no room: 320 kB .* on the disk of .*srpo_rewards"):
        download.check_space([elsewhere, item])


def test_nobody_to_ask(server, home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert srpo("hpsv2") == 2
    captured = capsys.readouterr()
    assert "add --yes" in captured.err
    assert "To download: 320 kB" in captured.out
    assert not server.bodies()


@pytest.mark.parametrize(("answer", "fetched"), [("y", 1), ("", 0), ("no", 0)])
def test_the_answer_counts(server, home, monkeypatch, answer, fetched):
    monkeypatch.setattr(download.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert srpo("hpsv2") == 0
    assert len(server.bodies()) == fetched


def test_what_the_hub_lacks(server, home, capsys):
    assert srpo("clip", "--yes") == 1
    assert f"no repository laion/CLIP-ViT-H-14-laion2B-s32B-b79K at {server.url}" in capsys.readouterr().err
    server.add("xswu/HPSv2", {"README.md": b"moved"})
    assert srpo("hpsv2", "--yes") == 1
    assert f"xswu/HPSv2 holds no {HPS} any more" in capsys.readouterr().err


def test_no_hub_at_all(server, home, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert srpo("hpsv2", "--yes") == 1
    assert "no connection to http://127.0.0.1:9" in capsys.readouterr().err
    monkeypatch.setattr(constants, "ENDPOINT", f"{server.url}/elsewhere")
    assert srpo("hpsv2", "--yes") == 1
    error = capsys.readouterr().err
    assert "is HF_ENDPOINT right?" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("path", [None, "../elsewhere", "/elsewhere.json", "..\\elsewhere.json", "c:x.json", "a//b"])
def test_a_hub_can_name_no_file_outside_its_folder(server, home, capsys, path):
    repo = server.repos["xswu/HPSv2"]
    if path is None:
        repo.commit = "../../../elsewhere"
    else:
        repo.files[path] = b"x"
    assert srpo("hpsv2", "--yes") == 1
    assert "doesn't answer like a hub" in capsys.readouterr().err
    assert not server.bodies()


def test_two_at_once(server, home):
    item = download.plan(download.choose(["hpsv2"]), None)[0]
    item.target.parent.mkdir(parents=True)
    with download._alone(item), pytest.raises(hub.DownloadError, match="another process"):
        download.fetch([item])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["hpsv3"], "did you mean 'hpsv2'"),
        (["hpsv2", "--to", "nowhere"], "write --to cache"),
        (["hpsv2", "--to", "cache", "x"], "write --to cache"),
        (["hpsv2", "--to", "comfyui", "/no/such/folder"], "no folder `models`"),
        (["--to", "comfyui", "hpsv2"], "stand before --to"),
    ],
)
def test_wrong_words(home, capsys, words, reason):
    names = words if words[0] != "--to" else ["t5", *words]
    assert srpo(*names) == 2
    assert reason in capsys.readouterr().err


def test_where_is_comfyui(home, monkeypatch):
    monkeypatch.setattr(places, "comfyui_root", lambda: None)
    with pytest.raises(ConfigError, match="COMFYUI_PATH"):
        download.destination(["comfyui"])


def test_comfyui_is_found_from_its_custom_nodes(home, monkeypatch):
    monkeypatch.setattr(places, "__file__", str(home / "Comfy" / "custom_nodes" / "pack" / "srpo_core" / "places.py"))
    assert places.comfyui_root() == home / "Comfy"


def test_the_list_asks_nobody(server, home, capsys):
    assert srpo("--list") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in CATALOGUE)
    assert max(map(len, text.splitlines())) <= 80
    assert not server.seen


def test_the_catalogue_is_in_order():
    from srpo_core.description import describe_fields

    fields = {name for name, *_ in describe_fields()}
    for entry in CATALOGUE.values():
        assert {entry.setting, entry.cache_setting or entry.setting} <= fields
        assert set(entry.needs) <= set(CATALOGUE)
        assert any(file.place for file in entry.files), "something for ComfyUI"
        assert any(file.cached for file in entry.files), "something for the cache"
        for file in entry.files:
            assert file.repository.count("/") == 1
            assert file.sha256 is None or (len(file.sha256) == 64 and "*" not in file.path)
            assert file.place is None or "*" not in file.path or file.place.endswith("/")
