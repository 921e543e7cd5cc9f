"""The commands behind `srpo`: from parsed arguments to a call and what is said about it. They import what they need."""

from __future__ import annotations

import re
import textwrap
from argparse import Namespace
from pathlib import Path

from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import describe_fields, load_run, preset_names
from srpo_core.run_sources import command_line, run_folder, run_source, train_config


def train(args: Namespace) -> int:
    """Train, write the report, say where everything is."""
    from srpo_core.training_commands import train

    return train(args)


def status(args: Namespace) -> int:
    """Print a few lines about each run."""
    from srpo_core.training_commands import status

    return status(args)


def stop(args: Namespace) -> int:
    """Stop runs; 0 where none is at work any more."""
    from srpo_core.training_commands import stop

    return stop(args)


def plan(args: Namespace) -> int:
    """Say what a run takes of a card; the exit code is that of wrong settings where it doesn't fit."""
    from srpo_core.training_commands import plan

    return plan(args)


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
