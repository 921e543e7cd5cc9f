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
  srpo train miniature                         fine-tune the built-in small model on the CPU, in minutes
  srpo train miniature optim.lr=2e-4 seed=1    the same with other settings (srpo settings lists them)
  srpo report runs/miniature                   the run as one HTML page
  srpo doctor                                  what is installed here, and what is missing

exit codes:
  0 done, 1 failed on the way, 2 wrong settings, 3 training stopped and saved (go on with --resume), 130 interrupted
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
    _sample(add("sample", "draw pictures with a base or trained model"))
    _score(add("score", "score pictures with a reward"))
    _export(add("export", "write a run's weights for diffusers or ComfyUI"))
    _report(add("report", "write one HTML page about a run, or about several"))
    _doctor(add("doctor", "say what is installed, which device is used and what is missing"))
    _settings(add("settings", "list presets and settings with type, default and meaning"))
    return parser


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output.dir")


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with a prompt per line")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="last, best, base (untrained) or a step; default: last of a run, base of a preset",
    )
    parser.add_argument("--lora", metavar="FILE", help="a LoRA safetensors file to add (transformer.*.lora_A/B.weight)")
    parser.add_argument("--steps", type=_positive, help="Euler steps (default: output.preview_steps)")
    parser.add_argument("--guidance", type=float, help="distilled guidance (default: output.preview_guidance)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the first picture of a prompt (default 0)")
    parser.add_argument("--count", type=_positive, default=1, help="pictures per prompt, with seeds counting up")
    parser.add_argument("--batch-size", type=_positive, help="pictures at once (default: data.batch_size)")
    parser.add_argument("--out", metavar="DIR", help="folder for the pictures (default: samples/ in the run or here)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are already there")


def _score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="FOLDER|FILE", help="pictures, or folders of pictures")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="a prompt per line, for the pictures in order; default: a .txt beside each picture, else its PNG metadata",
    )  # fmt: skip
    parser.add_argument(
        "--source",
        default="miniature",
        metavar="SOURCE",
        help=f"whose reward and words: {_SOURCE} (default: miniature)",
    )
    parser.add_argument("--reward", metavar="NAME", help="another reward than the source's")
    parser.add_argument("--reward-path", metavar="FILE", help="its weights")
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
        help="NAME.csv and NAME.json are written (default: srpo_scores beside the first picture)",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="the folder of a run")
    parser.add_argument("--checkpoint", default="last", metavar="NAME", help="last, best or a step (default last)")
    parser.add_argument(
        "--what", choices=("auto", "lora", "transformer"), default="auto",
        help="auto: the LoRA of a LoRA run, else the transformer; transformer: with the LoRA merged into it",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="PATH", help="a .safetensors file or a folder for diffusers (default: in export/)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 for a LoRA, else model.dtype"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--raw", action="store_true", help="the weights themselves, where the run also keeps their average"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; several seeds of one run are pooled")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run)")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="?", default="", metavar="TEXT", help="show settings whose name contains TEXT")
    parser.add_argument("--source", metavar="SOURCE", help=f"show the values of {_SOURCE} instead of the defaults")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
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
        print(f"srpo: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    """The exit code of an expected failure; None for a bug."""
    from srpo_core.config import ConfigError
    from srpo_core.errors import TrainingError

    if isinstance(error, ConfigError):
        return 2
    return 1 if isinstance(error, TrainingError | OSError) else None
