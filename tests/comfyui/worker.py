"""A program that imports ComfyUI, and nothing of ours, once: it then does one job after another, a folder each.

    python ..._in_comfyui.py CHECKOUT

Folders come as lines on the standard input, and a line END on the standard output says that one is done.
FOLDER/job.json says what to do. Left there: what the job writes, outputs.safetensors and report.json with what ComfyUI
logged on the way (level and message); or error.txt.
"""

import json
import logging
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

END = "::end"


class Collector(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def emit(self, record):
        self.logged.append([record.levelno, record.getMessage()])


def serve(work):
    """Jobs until the input ends; `work(job, folder)` gives (tensors, what else to report)."""
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before ComfyUI looks for devices
    import comfy.model_management
    import comfy.sd  # what it says of the machine is said before what it says of our files

    collector = Collector()
    logging.getLogger().addHandler(collector)
    logging.getLogger().setLevel(logging.DEBUG)
    for line in sys.stdin:
        folder, collector.logged = Path(line.rstrip("\n")), []
        try:
            with torch.inference_mode():
                outputs, found = work(json.loads((folder / "job.json").read_text(encoding="utf-8")), folder)
            save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / "outputs.safetensors")
            report = {**found, "logged": collector.logged}
            (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        comfy.model_management.unload_all_models()
        print(END, flush=True)
