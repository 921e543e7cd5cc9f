"""`srpo export`: from its arguments to a call, and what is said about the file that it wrote."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from srpo_core.config import ConfigError
from srpo_core.description import load_run
from srpo_core.export.convert import convert, extract_lora
from srpo_core.export.extract import Errors
from srpo_core.export.run import export_run
from srpo_core.lora import ChosenLora
from srpo_core.weights.lora_names import read_lora
from srpo_core.weights.recognise import recognise
from srpo_core.weights.tensors import open_tensors

FOLDERS = {"lora": "loras", "autoencoder": "vae", "transformer": "diffusion_models"}
"""ComfyUI's folder in models/ for each kind of file."""


def export(args: Namespace) -> int:
    """Write a run's weights, or those of a file in another form, and say where they are."""
    source = Path(args.source)
    _check_options(args, is_run(source))
    if is_run(source):
        _say(_of_run(args, source))
    elif args.extract:
        _say(_extracted(args))
    else:
        loras = [ChosenLora.parse(text) for text in args.merge]
        for lora in loras:
            for note in read_lora(lora.path, "--merge").notes:
                print(note)
        _say(convert(source, args.out, args.format, args.dtype, loras, args.overwrite))
    return 0


def is_run(source: Path) -> bool:
    """Whether SOURCE is a run's folder; ConfigError if it is nothing, or a folder with neither a run nor weights."""
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder")
    if not source.is_dir() or (source / "run.json").is_file():
        return source.is_dir()
    if not any(source.glob("*.safetensors")) and not (source / "transformer").is_dir():
        raise ConfigError(f"{source} holds no run: there is no run.json; nor does it hold weights (.safetensors)")
    return False


def _check_options(args: Namespace, run: bool) -> None:
    """ConfigError for options that don't go together."""
    for option, value in (("--merge", args.merge), ("--extract", args.extract)):
        if run and value:
            raise ConfigError(
                f"{option} is for files of weights; export the run first (--what transformer --out NAME.safetensors)"
            )
    for option, value in (("--checkpoint", args.checkpoint), ("--raw", args.raw)):
        if not run and value:
            raise ConfigError(f"{option} is for runs; {args.source} is no run's folder")
    if not run and not args.out:
        raise ConfigError("--out names the file (.safetensors) or folder to write")
    if not run and args.what not in ("auto", "lora" if args.extract else "transformer"):
        raise ConfigError(f"--what {args.what} is for runs; a file is converted whole, --extract makes a LoRA of two")
    if args.merge and args.extract:
        raise ConfigError("--merge and --extract are two jobs: one after the other")
    if bool(args.extract) != bool(args.rank):
        raise ConfigError("--extract BASE and --rank N belong together")


def _of_run(args: Namespace, source: Path) -> Path:
    path = export_run(
        source, args.out, args.what, args.checkpoint or "last", False if args.raw else None, args.dtype,
        args.overwrite, args.format,
    )  # fmt: skip
    model = load_run(str(source / "run.json")).model
    if model.lora and path.is_file() and _part(path) == "lora":
        print(
            f"The run was trained on top of {model.lora} (strength {model.lora_strength:g}): this LoRA needs that one"
            " too. --what transformer writes a transformer that holds both."
        )
    return path


def _extracted(args: Namespace) -> Path:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = "comparing tensors", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("")
        path, errors = extract_lora(
            args.source, args.extract, args.rank, args.out, args.dtype, args.overwrite,
            on_layer=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    _say_errors(errors)
    return path


def _say_errors(errors: Errors) -> None:
    print("Relative error of the LoRA, |difference - LoRA| / |difference|:")
    for group, error in errors.relative().items():
        print(f"  {group:<10} {error:.2g}")
    if errors.beyond:
        name, size = max(errors.beyond.items(), key=lambda item: item[1])
        print(
            f"{len(errors.beyond)} biases and norms differ too, which a LoRA can't hold: by {size:.1e} of their size at"
            f" most ({name})"
        )


def _part(path: Path) -> str:
    return recognise(open_tensors(path, "")).part


def _say(path: Path) -> None:
    print(f"Written: {path}")
    if path.is_file():
        folder = FOLDERS.get(_part(path))
        if folder:
            print(f"ComfyUI finds it in its models/{folder} folder.")
    else:
        print("It is in diffusers format; with --out NAME.safetensors it becomes one file for ComfyUI.")
