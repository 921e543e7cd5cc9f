"""`python -m srpo_core ...`, or `python /path/to/srpo_core/__main__.py ...` from any folder, installed or not."""

import sys
from pathlib import Path


def _find_package() -> None:
    """Started by path, Python looks for modules beside this file, where ours would hide others of the same name."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    sys.path.insert(0, str(here.parent))


if __name__ == "__main__":
    if not __package__:
        _find_package()
    from srpo_core.cli import main

    sys.exit(main())
