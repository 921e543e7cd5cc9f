"""The command `srpo`: its arguments, its exit codes and its errors. The commands themselves are in commands.py.

Exit codes: 0 done, 1 failed on the way, 2 wrong settings or arguments, 3 training stopped on request with its state
saved, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_EPILOG = """\
start here:
  srpo train miniature                  the built-in small model, on the CPU
  srpo train miniature optim.lr=2e-4    with other settings (srpo settings)
  srpo report runs/miniature            the run as one HTML page
  srpo doctor                           what is installed, what is missing

exit codes:
  0 done, 1 failed on the way, 2 wrong settings or arguments,
  3 training stopped and saved (go on with --resume), 130 interrupted
"""
_SOURCE = "a preset (srpo settings lists them), a .yaml or .json description, or the folder of a run"
_OVERRIDES = "settings to change, for example optim.lr=1e-5"


def version() -> str:
    """The project's version: of the checkout that this file stands in, else of the installed package."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    if found and 'name = "comfyui-srpo"' in text:
        return found[1]
    from importlib import metadata

    try:
        return metadata.version("comfyui-srpo")
    except metadata.PackageNotFoundError:
        return "unknown"


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """The function `name` of commands.py, imported when it runs: the parser itself loads nothing."""

    def run(args: argparse.Namespace) -> int:
        if name != "download":
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # no bar for loading a local file
        from srpo_core import commands

        return getattr(commands, name)(args)

    return run


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsed arguments hold `run`, the command's function."""
    parser = argparse.ArgumentParser(
        prog="srpo",
        description="SRPO fine-tuning of flow models: train, look at what changed, export.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"srpo {version()}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text[:1].upper() + help_text[1:] + ".")
        command.set_defaults(run=_command(name))
        return command

    _train(add("train", "train a model, or go on with a run"))
    _plan(add("plan", "predict a run's memory and time on cards that need not be there, and what would fit"))
    _status(add("status", "say what runs are doing, and why one failed"))
    _stop(add("stop", "have runs save and end, within seconds"))
    _sample(add("sample", "draw pictures with a base or trained model, on one or more GPUs (torchrun)"))
    _encode(add("encode", "encode a run's prompts ahead of it, on one or more GPUs (torchrun)"))
    _score(add("score", "score pictures with a reward: CSV, JSON and a page to look through"))
    _export(add("export", "write weights for diffusers or ComfyUI: of a run, or of a file in another form"))
    _report(add("report", "write one HTML page about a run, or about several"))
    _download(add("download", "fetch models and rewards; sizes and licences are shown first"))
    _doctor(add("doctor", "say what is installed, which device is used and what is missing"))
    _settings(add("settings", "list presets and settings with type, default and meaning"))
    return parser


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output.dir")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check files, sizes, memory and disk, say what the run is, don't start it",
    )
    parser.add_argument(
        "--background", action="store_true",
        help="check, then train in a process of its own that goes on when this one ends (srpo status, srpo stop)",
    )  # fmt: skip


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
    parser.add_argument("--card-gb", type=float, metavar="GB", help="memory of a card (default: this machine's)")
    parser.add_argument("--gpus", type=_positive, metavar="N", help="cards (default: parallel.processes)")
    parser.add_argument(
        "--tflops", type=float, metavar="N",
        help="10^12 operations a second of its bfloat16 matrix products (default: this machine's card is tried)",
    )  # fmt: skip


def _status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs (default: all in the folder runs)")


def _stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--patience", type=_positive, default=600, metavar="SECONDS",
        help="end a run's processes if they are still there by then, which loses what came after the last checkpoint"
        " (default 600)",
    )  # fmt: skip


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a text, CSV or JSONL file of prompts (data.prompt_column)")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="last, best, base (untrained) or a step; default: last of a run, base of a preset",
    )
    parser.add_argument(
        "--lora", action="append", metavar="FILE[:STRENGTH]",
        help="a LoRA .safetensors file to add, with its strength (default 1); may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_positive, help="Euler steps (default: 50 with FLUX, else output.preview_steps)"
    )
    parser.add_argument("--guidance", type=_guidance, help="distilled guidance (default: output.preview_guidance)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the first picture of a prompt (default 0)")
    parser.add_argument("--count", type=_positive, default=1, help="pictures per prompt, with seeds counting up")
    parser.add_argument("--batch-size", type=_positive, help="pictures at once (default: data.batch_size)")
    parser.add_argument("--out", metavar="DIR", help="folder for the pictures (default: samples/ in the run or here)")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="draw all anew; else pictures of the same settings are kept, and others in their places refused",
    )  # fmt: skip


def _encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
    parser.add_argument(
        "--prompts", metavar="FILE", help="these prompts instead of the run's own, in any form of data.prompts"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the embeddings (default: as data.embeddings says)")


def _score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="FOLDER|FILE", help="pictures, or folders of pictures")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="a text, CSV or JSONL file of prompts, for the pictures in order; default: a .txt beside each picture,"
        " else its own metadata (this project's, A1111's or ComfyUI's)",
    )  # fmt: skip
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help=f"whose reward and words: {_SOURCE} (default: the run in whose folder the pictures lie, else miniature)",
    )
    parser.add_argument("--reward", metavar="NAME", help="another reward than the source's")
    parser.add_argument(
        "--fit", choices=("pad", "crop"),
        help="how the reward sees a picture: whole, with black beside it, or its centre square; default: as in the"
        " reward's official scoring, which is pad for hpsv2 and crop for others",
    )  # fmt: skip
    parser.add_argument("--reward-path", metavar="FILE", help="its weights (reward.path)")
    parser.add_argument("--liked", metavar="WORD,WORD", help="liked control words")
    parser.add_argument("--disliked", metavar="WORD,WORD", help="disliked control words")
    parser.add_argument(
        "--measures", action="store_true", help="add the held-out measures of the source's model family"
    )
    parser.add_argument("--batch-size", type=_positive, default=8, help="pictures at once (default 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument(
        "--out",
        metavar="NAME",
        help="NAME.csv, NAME.json and NAME.html are written (default: srpo_scores beside the first picture)",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="the folder of a run, or a transformer or LoRA: a file, or a diffusers folder"
    )
    parser.add_argument(
        "--out", metavar="PATH",
        help="a .safetensors file, or a folder in diffusers format (default for a run: in its export/)",
    )  # fmt: skip
    parser.add_argument(
        "--what", choices=("auto", "lora", "transformer", "vae"), default="auto",
        help="of a run; auto: the LoRA of a LoRA run, else the transformer; transformer: with all LoRAs merged into it",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("diffusers", "comfyui"),
        help="names inside: diffusers' (folder or file), or FLUX's original ones, as ComfyUI's files have (one file); a"
        " LoRA has one form that both read (default: diffusers; comfyui for a VAE)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "scaled-fp8"),
        help="scaled-fp8: 8 bits with a scale for each matrix, for --format comfyui (default: float32 for a LoRA, else"
        " model.dtype of a run and the file's own of a file)",
    )  # fmt: skip
    parser.add_argument(
        "--merge", action="append", default=[], metavar="LORA[:STRENGTH]",
        help="add a LoRA file to the transformer SOURCE; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--extract", metavar="BASE", help="write a LoRA that turns the transformer BASE into SOURCE, of rank --rank"
    )
    parser.add_argument("--rank", type=_positive, metavar="N", help="rank of the extracted LoRA")
    parser.add_argument("--checkpoint", metavar="NAME", help="of a run: last (default), best or a step")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--raw", action="store_true", help="the weights themselves, where the run also keeps their average"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; several seeds of one run are pooled")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run)")


def _download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; --list says what there is")
    parser.add_argument(
        "--to", nargs="+", default=["cache"], metavar="PLACE",
        help="cache: the Hugging Face cache (default); comfyui [FOLDER]: ComfyUI's model folders; default folder:"
        " COMFYUI_PATH, or the ComfyUI in whose custom_nodes this project lies",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="go ahead without asking")
    parser.add_argument("--list", action="store_true", help="list what can be fetched and what is here already")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="say what these weight files or folders are instead")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="?", default="", metavar="TEXT", help="show settings whose name contains TEXT")
    parser.add_argument("--source", metavar="SOURCE", help=f"show the values of {_SOURCE} instead of the defaults")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _guidance(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to 100")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to 2**63 - 1")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a command; settings may stand before, between and behind its options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not hasattr(args, "overrides") or any(part.startswith("-") or "=" not in part for part in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    if args.run is None:
        parser.print_help()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Expected failures are a line on stderr, anything else a traceback."""
    args = parse(argv)
    if args.run is None:
        return 0
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("srpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        from srpo_core.devices import process_name

        print(f"{process_name()}: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    """The exit code of an expected failure; None for a bug."""
    from srpo_core.config import ConfigError
    from srpo_core.errors import TrainingError

    if isinstance(error, ConfigError):
        return 2
    return 1 if isinstance(error, TrainingError | OSError) else None
