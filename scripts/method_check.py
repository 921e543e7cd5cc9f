"""Measure two claims of the method on the miniature and record what comes out, whatever it is.

    python scripts/method_check.py align|inversion|all [--out runs/method-check] [--steps N --seeds 0 1 --prompts N]

align      Direct-Align against one-step prediction: how close one model call comes to the clean picture, level by level
inversion  training with both branches against training without inversion: looks, content and rewards over the steps

Results are the section "Method check" of the report of a run whose folder --out names: <out>/method_check.json, its
pictures, and all numbers per prompt in <out>/align.json and <out>/inversion.json. The runs of `inversion` are ordinary
run folders, <out>/inversion/<arm>-<seed>; finished ones are read, unfinished ones go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from method_check_align import LEVELS, check_align
from method_check_inversion import Stopped, check_inversion

from srpo_core.config import ConfigError
from srpo_core.errors import TrainingError
from srpo_core.files import write_atomic
from srpo_core.session import STOPPED_EXIT_CODE

ORDER = ("align", "align-lengths", "inversion", "inversion-steps")
"""Names of the claims, in the order of their reading."""


def record_claims(out: Path, claims: Sequence[Mapping[str, Any]]) -> Path:
    """Put claims into <out>/method_check.json, each in place of an older one of its name; the file."""
    path = out / "method_check.json"
    old = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.is_file() else []
    by_name = {claim["name"]: claim for claim in [*old, *claims]}
    ordered = sorted(by_name.values(), key=lambda claim: ORDER.index(claim["name"]))
    write_atomic(path, json.dumps({"claims": ordered}, indent=1))
    return path


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns of text."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=("align", "inversion", "all"))
    parser.add_argument("--out", type=Path, default=Path("runs/method-check"), help="folder of the results")
    parser.add_argument("--preset", default="miniature", help="preset or .yaml/.json file that both claims start from")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings: --set optim.lr=2e-5")
    parser.add_argument("--prompts", type=int, help="held-out prompts: 48 in align, 32 in inversion's previews")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="align: levels sigma")
    parser.add_argument("--guidance", type=float, help="align: guidance of the one call (the rollout's by default)")
    parser.add_argument("--steps", type=int, help="inversion: optimizer steps of each run (the preset's by default)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="inversion: a run per arm and seed")
    parser.add_argument("--every", type=int, default=4, help="inversion: steps between previews")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, record, print; the exit code."""
    args = arguments(argv)
    checks = {
        "align": lambda: check_align(args.preset, args.set, args.out, args.prompts or 48, args.levels, args.guidance),
        "inversion": lambda: check_inversion(
            args.preset, args.set, args.out, args.prompts or 32, args.steps, args.seeds, args.every
        ),
    }
    for name in checks if args.claim == "all" else [args.claim]:
        try:
            claims = checks[name]()
        except (ConfigError, TrainingError) as error:
            print(error, file=sys.stderr)
            return 1
        except Stopped as stopped:
            print(f"{stopped}; the same command goes on from there")
            return STOPPED_EXIT_CODE
        for claim in claims:
            print(f"\n{claim['title']}\n{text_table(claim['rows'])}\n{claim['finding']}")
        print(f"\nrecorded in {record_claims(args.out, claims)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
