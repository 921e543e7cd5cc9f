"""How long loading a FLUX transformer takes and what memory it needs, for each format that people have it in.

    python scripts/bench_load.py --folder /big/disk --device cuda --out bench_load.json
    python scripts/bench_load.py --folder /tmp/bench --blocks 2 4 --device cpu      # a smaller model

Files of random weights are made (and kept for the next time, 23.8 GB for each bf16 format at full size), then each is
loaded by the product's own loader in a process of its own, which measures its peak of host memory beyond what it held
before, and draws one velocity to see that the numbers are finite. Results are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.estimate import DECODE_RECOMPUTED
from srpo_core.export.writer import SUFFIX, plan, write_file
from srpo_core.interfaces import PromptBatch
from srpo_core.models.flux import FluxFlow
from srpo_core.models.flux_files import CLASSES, transformer_at
from srpo_core.weights.flux_names import to_original
from srpo_core.weights.fp8 import scaled_fp8
from srpo_core.weights.loading import empty_parameters

Stream = Iterator[tuple[str, Tensor]]
FORMATS = ("diffusers-fp32", "diffusers-bf16", "original-bf16", "original-fp8", "original-scaled-fp8")
BANK = 1 << 22
"""Random numbers that all weights are made of."""


def machine(command: str) -> dict[str, object]:
    """What a benchmark's results say of where they come from."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "decoder_bytes_a_pixel": DECODE_RECOMPUTED,
        "command": command,
    }


def weights(blocks: tuple[int, int], meta: bool) -> Stream:
    """FLUX.1-dev's tensors under diffusers' names, with fewer blocks if asked for; on meta or random in bfloat16."""
    with empty_parameters():
        model = CLASSES["FluxTransformer2DModel"](
            num_layers=blocks[0], num_single_layers=blocks[1], guidance_embeds=True
        )
    bank = torch.randn(BANK, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, tensor in model.state_dict().items():
        if meta:
            yield name, tensor.bfloat16()
            continue
        scale = 0.5 / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 0.1
        numbers = bank.repeat(-(-tensor.numel() // BANK))[: tensor.numel()].view(tensor.shape)
        yield name, torch.ones_like(numbers) if ".norm_" in name and tensor.ndim == 1 else numbers * scale


def in_format(stream: Stream, form: str) -> Stream:
    """The stream under the names and in the numbers of a format."""

    def matrix(name: str, tensor: Tensor) -> bool:
        return tensor.ndim == 2 and "blocks." in name

    if form == "diffusers-fp32":
        return ((name, tensor.float()) for name, tensor in stream)
    if form == "original-fp8":
        return ((n, t.to(torch.float8_e4m3fn) if matrix(n, t) else t) for n, t in to_original(stream))
    if form == "original-scaled-fp8":
        return scaled_fp8(to_original(stream), matrix)
    return to_original(stream) if form == "original-bf16" else stream


def make(path: Path, form: str, blocks: tuple[int, int]) -> None:
    """Write a file in `form`, unless it is there."""
    if not path.is_file():
        planned = plan(in_format(weights(blocks, True), form))
        write_file(path, planned, in_format(weights(blocks, False), form), {})


def memory(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(path: Path, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Load the file and draw one velocity; seconds, bytes."""
    if device.type == "cuda":
        torch.zeros(1, device=device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before, start = memory("VmRSS"), time.perf_counter()
    part = transformer_at(path, "file")
    module = part.load(dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    target = sum(p.numel() * p.element_size() for p in module.parameters())
    largest = max(info.bytes for info in part.file.info.values())
    result: dict[str, object] = {
        "seconds": round(seconds, 2),
        "file_bytes": path.stat().st_size,
        "target_bytes": target,
        "largest_tensor_bytes": largest,
        "host_peak_bytes": peak,
        "host_peak_beyond_target_bytes": peak - (target if device.type == "cpu" else 0),
    }
    if device.type == "cuda":
        result["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    config = module.config
    embeds = torch.randn(1, 8, config.joint_attention_dim, device=device)
    pooled = torch.randn(1, config.pooled_projection_dim, device=device)
    prompts = PromptBatch(("a cat",), {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    with torch.no_grad():
        latents = torch.randn(1, config.in_channels // 4, 8, 8, device=device)
        velocity = FluxFlow(module, dtype=dtype).velocity(latents, torch.tensor([0.9], device=device), prompts, 3.5)
    return result | {"finite": bool(velocity.isfinite().all()), "velocity_std": round(float(velocity.std()), 4)}


def main() -> None:
    """Make the files, measure each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--blocks", nargs=2, type=int, default=(19, 38), help="double and single blocks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the loaded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--delete", action="store_true", help="delete each file once it is measured")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, getattr(torch, args.dtype), torch.device(args.device))))
        return
    results = []
    for form in args.formats:
        path = args.folder / f"{form}-{args.blocks[0]}-{args.blocks[1]}{SUFFIX}"
        make(path, form, tuple(args.blocks))
        command = [sys.executable, __file__, "--folder", str(args.folder), "--one", str(path)]
        command += ["--dtype", args.dtype, "--device", args.device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{form}: {done.stderr}")
        row = {"format": form, "blocks": list(args.blocks), "dtype": args.dtype, "device": args.device}
        row |= json.loads(done.stdout.strip().splitlines()[-1])
        results.append(row)
        beyond, largest = row["host_peak_beyond_target_bytes"] / 2**20, row["largest_tensor_bytes"] / 2**20
        print(
            f"{form:20} {row['file_bytes'] / 1e9:6.1f} GB  {row['seconds']:7.2f} s  host peak beyond the target"
            f" {beyond:7.0f} MiB (largest tensor {largest:.0f} MiB)  finite {row['finite']}",
            flush=True,
        )
        if args.delete:
            path.unlink()
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
