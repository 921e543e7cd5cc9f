"""Make the miniature's weights from nothing: drawn pictures, four small networks trained on them, quality measured.

    python scripts/build_miniature.py [--out FOLDER] [--stages STAGE ...] [--device cuda]

Stages, each a few minutes on one GPU, each reading what the earlier ones left in FOLDER:
  autoencoder  pictures -> 16-channel latents -> pictures; latents near unit normal, decoder used to a little noise
  clip         text and image towers, contrastive, with neighbouring scenes and several looks of a scene in every batch
  clip_images  the image tower alone goes on
  judge        the held-out detector, on pictures that went through the autoencoder, blur and noise
  flow         the FLUX transformer: rectified flow on latents and captions, a tenth of the captions empty
  guidance     distilled guidance: one call learns what a captioned and an empty call give with classifier-free guidance
  quality      samples of held-out captions measured by the judge and from pixels; contact sheet
Weights are float32 while training and bfloat16 in FOLDER; quality.json and build.log stand beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installing the project

from miniature.build import SEED, Build
from miniature.flow import train_flow, train_guidance
from miniature.perception import train_autoencoder, train_clip, train_clip_images, train_judge
from miniature.quality import check_quality

from srpo_core.miniature.models import WEIGHTS

STAGES: dict[str, Callable[[Build], None]] = {
    "autoencoder": train_autoencoder, "clip": train_clip, "clip_images": train_clip_images, "judge": train_judge,
    "flow": train_flow, "guidance": train_guidance, "quality": check_quality,
}  # fmt: skip


def main() -> None:
    """Run the chosen stages in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="steps and pictures, as a part of the full build (for trying it out)"
    )
    parser.add_argument("--stage-minutes", type=float, default=10.0, help="a stage trains no longer than this")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that draw scenes")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward is not reliable on these shapes
    build = Build(args)
    for name in args.stages:
        torch.manual_seed(SEED)
        begin = time.time()
        STAGES[name](build)
        build.log(f"stage {name} took {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
