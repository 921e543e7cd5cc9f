"""Reading safetensors files: what is read, what is refused and in which words, and that nothing else ever happens."""

import json
import os
import pickle
import tracemalloc
import zipfile

import pytest
import torch
from flux_weights import header_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from srpo_core.weights.tensors import DTYPES, WeightsError, open_tensors

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "b.code": torch.tensor([1.0, -0.5, 448.0]).to(torch.float8_e4m3fn),
    "b.empty": torch.empty(0, 5),
    "c": torch.tensor(7),
}
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, content):
    path.write_bytes(content)
    return path


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.float(), right.float())


# ---- reading


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_comes_back_as_the_library_reads_it(tmp_path, dtype):
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(DTYPES[dtype])
    try:
        save_file({"x": tensor}, tmp_path / "x.safetensors", {"made": "here"})
    except KeyError:
        pytest.skip("this version of the library doesn't write it")
    file = open_tensors(tmp_path / "x.safetensors", "model.path")
    assert file.metadata == {"made": "here"}
    assert (file.info["x"].dtype, file.info["x"].shape) == (dtype, (2, 3))
    read = file.read("x")
    assert read.dtype == tensor.dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_tensors_own_their_memory_and_views_cut_prefixes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors", "model.path")
    first = file.read("a.weight")
    first.zero_()
    assert torch.equal(file.read("a.weight"), TENSORS["a.weight"])
    view = file.prefix("b.")
    assert sorted(view.info) == ["code", "empty"]
    assert "code" in view and "b.code" not in view
    assert same(view.read("code"), TENSORS["b.code"])
    assert view.sample("code", 2) == TENSORS["b.code"].view(torch.uint8).numpy().tobytes()[:2]
    outline = file.outline().prefix("a.").read("weight")
    assert outline.is_meta and outline.shape == (3, 4)


def test_a_file_larger_than_memory_costs_its_header_and_what_is_read(tmp_path):
    path = header_only(tmp_path / "x.safetensors", {"big": (1 << 20, 1 << 15), "small": (5,)}, "F32")
    assert path.stat().st_size > 1 << 37
    tracemalloc.start()
    file = open_tensors(path, "model.path")
    assert torch.equal(file.read("small"), torch.zeros(5))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_shards_and_folders_are_one_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.safetensors", {"k": "v"})
    save_file({"b": torch.zeros(3)}, tmp_path / "m-00002-of-00002.safetensors")
    weight_map = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}), encoding="utf-8")
    for path in (index, tmp_path):
        file = open_tensors(path, "model.transformer")
        assert sorted(file.info) == ["a", "b"]
        assert torch.equal(file.read("b"), torch.zeros(3))
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.transformer=.*its shard m-00002-of-00002\.safetensors is missing"):
        open_tensors(tmp_path, "model.transformer")
    index.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"no \.safetensors file beside it"):
        open_tensors(index, "model.transformer")
    index.write_text(json.dumps({"weight_map": weight_map | {"b": "m-00001-of-00002.safetensors"}}), encoding="utf-8")
    with pytest.raises(WeightsError, match="does not hold b, as the index says"):
        open_tensors(index, "model.transformer")


def test_a_folder_with_two_files_asks_which(tmp_path):
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"several files of weights \(one.safetensors, two.safetensors\); name one"):
        open_tensors(tmp_path, "model.path")
    save_file({"usual": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "usual" in open_tensors(tmp_path, "model.path")


def test_folders_in_the_wild(tmp_path):
    """A mac's or an unfinished export's hidden files are no weights; an ending in capitals is one too."""
    save_file({"a": torch.ones(2)}, tmp_path / "MODEL.SAFETENSORS")
    (tmp_path / "._MODEL.safetensors").write_bytes(b"\0\5\x16\7" * 9)
    (tmp_path / ".tmp-x.safetensors").write_bytes(b"half")
    assert "a" in open_tensors(tmp_path, "")


def test_a_shard_by_itself_is_named(tmp_path):
    for number in (1, 2):
        save_file(TENSORS, tmp_path / f"m-0000{number}-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"is one of several shards; name its folder, or the index beside it"):
        open_tensors(tmp_path / "m-00002-of-00002.safetensors", "model.transformer")
    with pytest.raises(WeightsError, match=r"holds shards without their index; copy \*\.safetensors\.index\.json too"):
        open_tensors(tmp_path, "model.transformer")
    save_file(TENSORS, tmp_path / "whole-00001-of-00001.safetensors")
    assert open_tensors(tmp_path / "whole-00001-of-00001.safetensors", "").info.keys() == TENSORS.keys()


# ---- refusing


def zipped_pickle(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return path


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23802932552\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b'{"error": "not found"}', "is JSON, not weights"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
        (pickle.dumps({"a": 1}), "is a pickle"),
        (bytes(4096), "zeros only"),
        (bytes(range(1, 200)), "no safetensors file, or its beginning is damaged"),
        ((1 << 62).to_bytes(8, "little") + b"{" + bytes(100), "claims 4611686018427387904 bytes"),
        ((500).to_bytes(8, "little") + b"{" + bytes(100), "cut short: its header alone takes 500 bytes"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((2).to_bytes(8, "little") + b"{]", "its header is corrupt"),
        ((60_000).to_bytes(8, "little") + b'{"a":' + b"[" * 59_995, "its header is corrupt"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path, content, reason):
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(WeightsError) as error:
        open_tensors(path, "model.transformer")
    assert reason in str(error.value)
    assert str(error.value).startswith(f"model.transformer={str(path)!r}: ")
    assert "; " in str(error.value)


def test_pickles_and_missing_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"is a pickle .*use a \.safetensors file"):
        open_tensors(zipped_pickle(tmp_path / "flux.ckpt"), "model.transformer")
    with pytest.raises(WeightsError, match="only pickled weights"):
        open_tensors(tmp_path, "model.transformer")
    with pytest.raises(WeightsError, match="no such file or folder"):
        open_tensors(tmp_path / "gone.safetensors", "model.transformer")
    with pytest.raises(WeightsError):
        open_tensors("\0", "model.transformer")


def test_numbers_below_8_bits_are_counted_right_and_not_read(tmp_path):
    text = json.dumps({"x": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}).encode()
    path = write(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + bytes(3))
    with pytest.raises(WeightsError, match="x is stored as F4, which can't be read here"):
        open_tensors(path, "model.path").read("x")


def test_truncations_at_every_length_are_told(tmp_path):
    content = save(TENSORS)
    header = 8 + int.from_bytes(content[:8], "little")
    for size in {*range(0, 40), header - 1, header, header + 1, *range(len(content) - 20, len(content))}:
        with pytest.raises(WeightsError, match=r"empty|cut short|beginning is damaged"):
            open_tensors(write(tmp_path / "x.safetensors", content[:size]), "model.path")
    with pytest.raises(WeightsError, match="too long"):
        open_tensors(write(tmp_path / "x.safetensors", content + b"\0"), "model.path")


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors", "model.path")
    os.truncate(tmp_path / "x.safetensors", 200)
    with pytest.raises(WeightsError, match="the file ends too early"):
        for name in file.info:
            file.read(name)


# ---- fuzzing


def holds_the_law(path):
    """A file opens and all of it reads as the library reads it, or a WeightsError comes; never anything else."""
    try:
        file = open_tensors(path, "model.path")
    except WeightsError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return
    with safe_open(path, "pt") as theirs:
        assert sorted(theirs.keys()) == sorted(file.info)
        for name in file.info:
            ours = file.read(name)
            assert torch.equal(ours.view(-1).view(torch.uint8), theirs.get_tensor(name).view(-1).view(torch.uint8))


@FUZZ
@given(st.binary(max_size=300))
def test_random_bytes(tmp_path, content):
    holds_the_law(write(tmp_path / "x.safetensors", content))


@FUZZ
@given(st.data())
def test_mutated_files(tmp_path, data):
    content = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "insert", "delete", "cut"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 8))]
        else:
            del content[at:]
        if not content:
            break
    holds_the_law(write(tmp_path / "x.safetensors", bytes(content)))


NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**62, 2**63, 2**70, 1e3, True, None, "4"]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "I64", "F31", 7, None]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), st.none()),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), st.lists(NUMBERS, max_size=3), st.none()),
    }
)


@FUZZ
@given(st.dictionaries(st.text(max_size=6), ENTRIES, max_size=3), st.integers(0, 80))
def test_made_up_headers(tmp_path, header, size):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(size)
    holds_the_law(write(tmp_path / "x.safetensors", content))


@FUZZ
@given(st.data())
def test_headers_that_fit_the_file_are_read(tmp_path, data):
    """The other side of the law: well-formed headers in any order of entries are not refused."""
    names = data.draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    at, header = 0, {}
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        count = 1
        for side in shape:
            count *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * count]}
        at += 4 * count
    header = {name: header[name] for name in data.draw(st.permutations(names)) if name != "__metadata__"}
    if len(header) < len(names):
        return
    text = json.dumps(header).encode()
    path = write(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + os.urandom(at))
    file = open_tensors(path, "model.path")
    assert {name: info.shape for name, info in file.info.items()} == {n: tuple(e["shape"]) for n, e in header.items()}
    holds_the_law(path)


def test_the_library_refuses_what_is_refused_here(tmp_path):
    """Overlaps, gaps and trailing bytes: the format's own rules, not ours."""
    for spans in ([(0, 8), (4, 12)], [(0, 4), (8, 12)], [(4, 8), (8, 12)], [(0, 8), (8, 16)]):
        header = {str(i): {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(spans)}
        text = json.dumps(header).encode()
        path = write(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + bytes(12))
        with pytest.raises(WeightsError):
            open_tensors(path, "model.path")
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass
