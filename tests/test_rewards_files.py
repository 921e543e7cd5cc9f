"""Files of reward weights: only tensors are read, whoever wrote the file; everything else is an error that says why."""

import os
import pickle
import random
import warnings

import pytest
import torch
from safetensors.torch import save_file

from srpo_core.rewards.files import read_shapes, read_weights, seems
from srpo_core.weights.tensors import WeightsError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def written(folder):
    """The same tensors in every kind of file that is read."""
    save_file(TENSORS, folder / "a.safetensors")
    save_file(TENSORS, folder / "named wrongly.pt")
    torch.save(TENSORS, folder / "zip.pt")
    torch.save(TENSORS, folder / "zip without an ending")
    torch.save(TENSORS, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": TENSORS, "epoch": 3, "note": "text"}, folder / "wrapped.ckpt")
    return list(folder.iterdir())


def test_every_kind_of_file_gives_the_same_tensors(tmp_path):
    for path in written(tmp_path):
        found = read_weights(path, "reward.path")
        assert set(found) == set(TENSORS)
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
        )
        assert read_shapes(path, "reward.path") == {"a.weight": (2, 3), "b": (2,)}


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path):
    torch.save({"a": TENSORS["b"], "trap": Trap(tmp_path / "sprung")}, tmp_path / "zip.pt")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"trap": Trap(tmp_path / "sprung")}))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("zip.pt", "bare.pkl", "module.pt"):
        with pytest.raises(WeightsError, match=r"reward.path=.*holds more than tensors: such a pickle can run code"):
            read_weights(tmp_path / name, "reward.path")
    assert not (tmp_path / "sprung").exists()


def test_other_files_are_refused_with_the_reason(tmp_path):
    torch.save(TENSORS, tmp_path / "whole.pt")
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"deeper": TENSORS}}, tmp_path / "deep.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files made with it are still about
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "script.pt"))
    contents = {
        "short.pt": (tmp_path / "whole.pt").read_bytes()[:-200],
        "old short.pt": (tmp_path / "old.pt").read_bytes()[:-20],
        "empty.pt": b"",
        "zeros.pt": bytes(2000),
        "noise.pth": b"\x01\x02\x03\x04" * 100,
        "page.pt": b"<html>404</html>",
        "pointer.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    reasons = {
        "short.pt": "cut short",
        "old short.pt": "cut short or damaged",
        "empty.pt": "is empty",
        "zeros.pt": "damaged",
        "noise.pth": "its beginning is damaged",
        "page.pt": "is a web page",
        "pointer.pt": "git lfs pull",
        "list.pt": "holds a list, not weights by name",
        "deep.pt": "holds no tensors by name",
        "script.pt": "is a TorchScript archive",
        "missing.pt": "No such file",
        "": "holds only pickled weights",
        "nul\0.pt": "null byte",
    }
    for name, reason in reasons.items():
        for read in (read_weights, read_shapes):
            with pytest.raises(WeightsError, match=reason) as error:
                read(f"{tmp_path}/{name}" if "\0" in name else tmp_path / name, "reward.path")
            assert str(error.value).startswith("reward.path=")


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_anywhere_is_an_error_or_leaves_tensors(tmp_path, zipped):
    """300 files with bytes changed, or cut: never another exception, never something that is no tensor."""
    torch.save({"state_dict": TENSORS, "step": 1}, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole, rng, refused = (tmp_path / "whole.pt").read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole[: rng.randrange(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            found = read_weights(tmp_path / "damaged.pt", "reward.path")
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
        except WeightsError:
            refused += 1
    assert refused > 50


def test_what_weights_seem_to_be():
    known = {
        "an ImageReward checkpoint": ["blip.visual_encoder.cls_token", "blip.text_encoder.a", "mlp.layers.0.weight"],
        "a BLIP checkpoint": ["visual_encoder.cls_token", "text_encoder.a", "text_decoder.a"],
        "the aesthetic predictor's head": ["layers.0.weight", "layers.7.weight"],
        "a CLIP text encoder": ["text_model.embeddings.token_embedding.weight"],
        "a FLUX transformer": ["double_blocks.0.img_attn.qkv.weight"],
        None: ["conv.weight"],
    }
    assert {seems(names): names for names in known.values()} == known
