"""What a file or folder is that holds no safetensors weights, in a user's words: (reason, way out)."""

from __future__ import annotations

from pathlib import Path

AGAIN = "download or copy it again"
_SAFE = "use a .safetensors file: a pickle can run code when it is opened, so it is not"
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def what_else(path: Path, start: bytes) -> tuple[str, str]:
    """Reason and way out for a file that begins with the bytes `start` and is no safetensors file."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "the file is empty", AGAIN
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights themselves", "fetch them with `git lfs pull`"
    if text[:1] == b"<":
        return "is a web page, not weights", "download the file itself; gated models need a login"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which can't be trained or read here", "use the .safetensors file of the same model"
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80" or path.suffix.lower() in _PICKLES:
        return "is a pickle (PyTorch's .pt, .ckpt or .bin)", _SAFE
    if not start.strip(b"\x00"):
        return "begins with zeros only: an unfinished download", AGAIN
    if text[:1] in (b"{", b"["):
        return "is JSON, not weights", "name the .safetensors file; a server may have sent an error instead of it"
    return "is no safetensors file, or its beginning is damaged", AGAIN


def what_else_in_folder(folder: Path) -> tuple[str, str]:
    """Reason and way out for a folder without safetensors files."""
    if any(entry.suffix.lower() in _PICKLES for entry in folder.iterdir()):
        return "holds only pickled weights (.bin, .pt, .ckpt)", _SAFE
    if (folder / "model_index.json").is_file():
        return "holds a whole model in parts", "name the part's own folder"
    usual = "diffusion_pytorch_model.safetensors or model.safetensors"
    return f"holds no .safetensors file, such as {usual}", "name a folder or a file with weights in it"
