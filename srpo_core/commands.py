"""The commands behind `srpo`: from parsed arguments to a call and what is said about it. They import what they need."""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import DIGEST, describe_fields, load_run, preset_names


def run_folder(source: str) -> Path | None:
    """The run folder that a SOURCE argument names; None for a preset or a file."""
    return Path(source) if source not in preset_names() and Path(source).is_dir() else None


def run_source(source: str) -> str:
    """What load_run reads for a SOURCE argument: a run's folder stands for its run.json."""
    folder = run_folder(source)
    if folder is None:
        return source
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{source} is no run folder: it holds no run.json")
    return str(folder / "run.json")


def train_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `train SOURCE` means: a run's folder is also its output.dir, wherever it was moved or copied to."""
    if run_folder(source) is None:
        return load_run(source, overrides, os.environ.pop(DIGEST, None))
    from srpo_core.run_folder import load_folder

    return load_folder(source, overrides)


def command_line(*words: str | Path) -> str:
    """A command for the user to type, started the way this process was."""
    started = Path(sys.argv[0])
    program = ["python", str(started)] if started.name == "__main__.py" else ["srpo"]
    return shlex.join([*program, *map(str, words)])


def train(args: Namespace) -> int:
    """Train, write the report, say where everything is."""
    config = train_config(args.source, args.overrides)
    if args.check:
        return _check(config, args.resume)
    if args.background:
        return _start(config, args.resume)
    from srpo_core import gpus, launch, result

    if launch.is_several(config.parallel) and not _is_one_of_several():
        return _train_several(config, args.resume)
    result.check(config)
    if not _is_one_of_several():
        os.environ.update(
            gpus.environment(config.parallel, gpus.find(config.parallel))
        )  # CUDA reads it when it starts, which is later
    from srpo_core.assemble import train_run
    from srpo_core.session import STOPPED_EXIT_CODE

    outcome = train_run(config, resume=args.resume)
    if _is_one_of_several():
        return 0  # torchrun takes another number for a failure; the run's state says how it ended
    if not outcome.finished:
        _say_stopped(config, outcome.step)
        return STOPPED_EXIT_CODE
    _say_where(config, Path(outcome.run_dir))
    return 0


def _is_one_of_several() -> bool:
    """Whether torchrun started this process."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _train_several(config: RunConfig, resume: bool) -> int:
    """Train in processes that torchrun starts, and wait for them."""
    from srpo_core import launch
    from srpo_core.session import STOPPED_EXIT_CODE

    state = launch.foreground(config, resume)
    if state is not None and state.status == "finished":
        _say_where(config, Path(config.output.dir))
        return 0
    if state is not None and state.status == "stopped":
        _say_stopped(config, state.step)
        return STOPPED_EXIT_CODE
    reason = state.error or state.status if state is not None else "its processes ended before they began"
    print(f"srpo: {reason}", file=sys.stderr)
    return 1


def _say_stopped(config: RunConfig, step: int) -> None:
    state = "the state is saved" if step else "there is nothing to save yet"
    print(f"\nStopped after step {step} of {config.optim.steps}; {state}.")
    print(f"Go on with:  {command_line('train', config.output.dir, '--resume')}")


def _start(config: RunConfig, resume: bool) -> int:
    """Check a run, then start it in a process of its own."""
    from srpo_core import launch
    from srpo_core.run_state import LOG_FILE

    launch.check(config, resume)
    _check(config, resume)
    pid, run_dir = launch.start(config, resume), config.output.dir
    print(f"\nStarted as process {pid}; what it prints goes to {Path(run_dir) / LOG_FILE}")
    print(f"Look:  {command_line('status', run_dir)}\nStop:  {command_line('stop', run_dir)}")
    return 0


def status(args: Namespace) -> int:
    """Print a few lines about each run."""
    from srpo_core.run_state import FILE, describe

    runs = [Path(run) for run in args.runs] or [file.parent for file in sorted(Path("runs").glob(f"*/{FILE}"))]
    if not runs:
        print("no run in the folder runs has a state; name a run's folder")
    for run in runs:
        print("\n".join(describe(run)))
    return 0


def stop(args: Namespace) -> int:
    """Stop runs; 0 where none is at work any more."""
    from srpo_core import launch
    from srpo_core.run_state import describe

    for run in map(Path, args.runs):
        launch.stop(run, args.patience)
        print("\n".join(describe(run)))
    return 0


def _check(config: RunConfig, resume: bool) -> int:
    from srpo_core import result
    from srpo_core.plan import plan_run

    lines = plan_run(config, resume).rows
    if (place := result.check(config)) is not None:
        lines = [*lines, ("result", str(place))]
    print("The run is fine to start:\n" + "".join(f"  {name:<12} {text}\n" for name, text in lines), end="")
    return 0


def plan(args: Namespace) -> int:
    """Say what a run takes of a card; the exit code is that of wrong settings where it doesn't fit."""
    from srpo_core.card_plan import Cards, plan_cards

    planned = plan_cards(train_config(args.source, args.overrides), Cards(args.card_gb, args.gpus, args.tflops))
    print("".join(f"  {name:<8} {text}\n" for name, text in planned.rows()), end="")
    return 0 if planned.fits else 2


def _say_where(config: RunConfig, run_dir: Path) -> None:
    from srpo_core.checkpoint import best, latest
    from srpo_core.report import write_report

    try:
        page = str(write_report([run_dir]))
    except Exception as error:  # the run itself is done and saved: a page that fails must not look like a failed run
        page = f"not written ({error})"
    newest, finest = latest(run_dir), best(run_dir)
    lines = [("report", page), ("checkpoint", newest)]
    if finest is not None and finest != newest:
        lines.append(("best", finest))
    places = {
        "previews": run_dir / "previews",
        "evaluation": run_dir / "evaluation",
        "curves": run_dir / "metrics.jsonl",
    }
    lines += [(name, path) for name, path in places.items() if path.exists()]
    print(f"\nDone: {config.optim.steps} steps. Everything is in {run_dir}")
    print("".join(f"  {name:<11} {path}\n" for name, path in lines))
    kind = "a LoRA file for ComfyUI and diffusers" if config.lora.rank else "weights for diffusers and ComfyUI"
    print(f"Next:\n  {command_line('export', run_dir)}\n      {kind}")
    print(f"  {command_line('sample', run_dir)}\n      pictures of held-out prompts, or of your own with --prompt TEXT")
    print(f"  {command_line('report', run_dir)}\n      the report again; with several runs (seeds), one page about all")


def sample(args: Namespace) -> int:
    """Draw pictures and say where they are."""
    config = load_run(run_source(args.source), args.overrides)
    from srpo_core import sampling
    from srpo_core.lora import ChosenLora

    run_dir = run_folder(args.source)
    checkpoint = sampling.chosen_checkpoint(run_dir, args.checkpoint)
    if args.prompt and args.prompts:
        raise ConfigError("give prompts by --prompt or by --prompts, not both")
    settings = sampling.SampleSettings.of(config, args.steps, args.guidance)
    name = checkpoint.name if checkpoint is not None else "base"
    folder = Path(args.out) if args.out else (run_dir / "samples" / name if run_dir else Path("samples"))
    outcome = sampling.sample(
        config, checkpoint, settings, folder,
        prompts=args.prompt, prompts_file=args.prompts,
        loras=[ChosenLora.parse(text) for text in args.lora or ()],
        seeds=range(args.seed, args.seed + args.count), batch_size=args.batch_size, overwrite=args.overwrite,
    )  # fmt: skip
    if not outcome.complete:  # another process draws on, and the last one says where everything is
        return 0
    count = len(outcome.files)
    kept = "" if outcome.drawn else "; they were there already" if count > 1 else "; it was there already"
    print(f"{count} {'picture' if count == 1 else 'pictures'} in {folder}{kept}")
    own = _run_of(folder)  # score's own default
    source = [] if config.reward == load_run(run_source(own)).reward else ["--source", args.source]
    print(f"Score them with:  {command_line('score', folder, *source)}")
    return 0


def encode(args: Namespace) -> int:
    """Encode prompts and say where their embeddings are."""
    config = train_config(args.source, args.overrides)
    if args.out is not None:
        config.data.embeddings = args.out
    from srpo_core.encoding import encode_run

    done = encode_run(config, args.prompts)
    print(done, flush=True)
    if args.out is not None and done.world.is_main:
        print(f"Train with them:  {command_line('train', args.source, *args.overrides, f'data.embeddings={args.out}')}")
    return 0


def score(args: Namespace) -> int:
    """Score pictures: the table on the terminal, as CSV and JSON, and a page to look through."""
    config = load_run(run_source(args.source or _run_of(Path(args.images[0]))))
    chosen = {
        "name": args.reward,
        "path": args.reward_path,
        "liked": _words(args.liked),
        "disliked": _words(args.disliked),
        "fit": args.fit,
    }
    from srpo_core import score_files, score_tables, scoring
    from srpo_core.files import check_writable
    from srpo_core.progress import Display
    from srpo_core.report.score_page import Thumbnails, write_score_page

    settings = scoring.reward_settings(config.reward, chosen)
    pictures = score_files.find_pictures([Path(name) for name in args.images], args.prompts, config.data.prompt_column)
    out = Path(re.sub(r"\.(csv|json|html)$", "", args.out)) if args.out else pictures[0].path.parent / "srpo_scores"
    check_writable(out.parent, "--out")
    thumbnails, model = Thumbnails(len(pictures)), config.model if args.measures else None
    with Display() as display:
        rows = scoring.score_pictures(pictures, settings, model, args.device, args.batch_size, thumbnails.add, display)
    score_tables.print_table(rows, settings)
    tables = score_tables.write_tables(rows, settings, out)
    page = write_score_page(rows, settings, thumbnails.uris, out, out.resolve().parent.name)
    print(f"Written: {', '.join(str(path) for path in tables)}\nPage:    {page}")
    return 0


def _run_of(pictures: Path) -> str:
    """The run in whose folder pictures lie, as `srpo sample` puts them there; else the miniature."""
    folders = [pictures.absolute(), *pictures.absolute().parents][:4]
    return next((str(folder) for folder in folders if (folder / "run.json").is_file()), "miniature")


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def export(args: Namespace) -> int:
    """Write weights in another form and say where they are."""
    from srpo_core.export.command import export

    return export(args)


def report(args: Namespace) -> int:
    """Write the page and say where it is."""
    from srpo_core.report import write_report

    print(write_report(args.runs, args.out))
    return 0


def download(args: Namespace) -> int:
    """List what can be downloaded, or download it."""
    from srpo_core import download as downloads

    if args.list or not args.names:
        print(downloads.listing())
        return 0
    return downloads.run(args.names, args.to, args.yes)


def doctor(args: Namespace) -> int:
    """Print what is installed and what is missing, or what given files are; 0 where the required parts are fine."""
    from srpo_core.doctor import describe_files, examine

    if args.files:
        lines, fine = describe_files(args.files)
        print("\n".join(lines))
        return 0 if fine else 1
    findings = examine()
    print(findings.to_json() if args.json else findings.to_text())
    return 0 if findings.fine else 1


def settings(args: Namespace) -> int:
    """Print presets and settings."""
    values = load_run(run_source(args.source)) if args.source else RunConfig()
    rows = [row for row in describe_fields() if args.filter in row[0]]
    if not rows:
        preset = f"; the preset's values: srpo settings --source {args.filter}" if args.filter in preset_names() else ""
        raise ConfigError(f"no setting's name contains {args.filter!r}{preset}")
    if not args.filter:
        print("Presets (srpo train PRESET):\n" + "".join(f"  {name}\n" for name in preset_names()))
        whose = f"values in {args.source}" if args.source else "defaults"
        print(f"Settings (section.key=value behind SOURCE) and their {whose}:\n")
    for name, kind, _, description in rows:
        value = values
        for part in name.split("."):
            value = getattr(value, part)
        print(f"{name} = {_shown(value)}    ({kind})")
        print(textwrap.fill(description, 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
