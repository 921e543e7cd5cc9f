"""The product's own commands on FLUX.1-dev at full size, with random weights: do they run, how long, in what memory.

    PYTHONPATH=. python scripts/full_size_run.py --folder /big/disk/flux --tokenizers FOLDER --out full_size.json

Makes the files that a ComfyUI user has (bf16 transformer under its original names, ae.safetensors, clip_l, t5xxl_fp16,
an HPS v2.1 reward; 40 GB), then encodes prompts, trains LoRAs (one under a cap of 24 GB), samples, scores and exports,
each by the `srpo` command in a process of its own. Pictures of random weights mean nothing: this shows mechanics,
seconds and memory. `--tokenizers` holds `tokenizer` and `tokenizer_2`. `--tiny` shrinks the models, to try the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_load import BANK, in_format, machine, weights
from torch import Tensor, nn

from srpo_core.export.writer import plan, write_file
from srpo_core.weights.loading import empty_parameters

PROMPTS = (
    "an old man reading under a lamp",
    "a red fox in the snow",
    "a glass of water on a table",
    "a market at dawn",
)
CHILD = r"""
import json, re, sys, torch
cap, report = float(sys.argv[1]), sys.argv[2]
if cap and torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / total))
from srpo_core.cli import main
from srpo_core.metrics import peak_memory_gib
code = main(sys.argv[3:])
peak = re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())
found = {"exit": code, "host_peak_gib": round(int(peak[1]) / 2**20, 2)}
if torch.cuda.is_available():
    found["device_peak_gib"] = round(peak_memory_gib(torch.device("cuda")), 2)
    found["device_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
open(report, "w").write(json.dumps(found))
sys.exit(code)
"""


def random_stream(module: nn.Module, meta: bool) -> Iterator[tuple[str, Tensor]]:
    """A module's state in bfloat16: matrices of gain one half, norms of weight 1, small biases."""
    bank = torch.randn(BANK, generator=torch.Generator().manual_seed(1)).bfloat16()
    for name, tensor in module.state_dict().items():
        if meta:
            yield name, torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
            continue
        numbers = bank.repeat(-(-max(1, tensor.numel()) // BANK))[: tensor.numel()].view(tensor.shape)
        if tensor.ndim < 2:
            numbers = torch.ones_like(numbers) if name.endswith(("weight", "logit_scale")) else numbers * 0.01
        else:
            numbers = numbers * (0.5 / tensor[0].numel() ** 0.5)
        yield name, numbers


def write(path: Path, module: nn.Module) -> None:
    """One file of a module's random weights, unless it is there."""
    if not path.is_file():
        write_file(path, plan(random_stream(module, True)), random_stream(module, False), {})


def make_files(folder: Path, tiny: bool) -> dict[str, str]:
    """The files of a whole FLUX.1-dev and HPS v2.1; settings that name them."""
    import open_clip
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    blocks = (1, 1) if tiny else (19, 38)
    transformer = folder / "flux1-dev.safetensors"
    if not transformer.is_file():
        write_file(
            transformer,
            plan(in_format(weights(blocks, True), "original-bf16")),
            in_format(weights(blocks, False), "original-bf16"),
            {},
        )
    sides = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    with empty_parameters():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, down_block_types=sides[0],
            up_block_types=sides[1],
        )  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=2 if tiny else 24,
                feed_forward_proj="gated-gelu", vocab_size=32128,
            )
        )  # fmt: skip
    hps = open_clip.create_model("ViT-H-14", device="meta")
    for name, module in (("ae", vae), ("clip_l", clip), ("t5xxl_fp16", t5), ("HPS_v2.1_compressed", hps)):
        write(folder / f"{name}.safetensors", module)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return {
        "model.transformer": str(transformer),
        "model.autoencoder": str(folder / "ae.safetensors"),
        "model.clip": str(folder / "clip_l.safetensors"),
        "model.t5": str(folder / "t5xxl_fp16.safetensors"),
        "reward.path": str(folder / "HPS_v2.1_compressed.safetensors"),
        "data.prompts": str(folder / "prompts.txt"),
        "data.embeddings": str(folder / "embeddings"),
    }


class Runs:
    """Commands run one by one and writes down what each took."""

    def __init__(self, folder: Path, out: Path | None) -> None:
        self.folder, self.out = folder, out
        self.results: list[dict[str, object]] = []

    def run(self, title: str, *words: str, cap_gb: float = 0.0) -> None:
        """A `srpo` command; `cap_gb` limits what it may take of the device, in 10^9 bytes."""
        report, start = self.folder / "child.json", time.perf_counter()
        report.unlink(missing_ok=True)
        command = [sys.executable, "-c", CHILD, str(cap_gb), str(report), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        row: dict[str, object] = {"what": title, "seconds": round(time.perf_counter() - start, 1)}
        if cap_gb:
            row["cap_gb"] = cap_gb
        row |= json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {"exit": done.returncode}
        print(json.dumps(row), flush=True)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-6000:], sep="\n", flush=True)
        self.results.append(row)
        self.save()

    def add(self, **values: object) -> None:
        """More about the last command."""
        self.results[-1] |= values
        print(json.dumps(values), flush=True)
        self.save()

    def save(self) -> None:
        """Write what is known so far."""
        if self.out is None:
            return
        about = machine(f"python {' '.join(sys.argv)}")
        self.out.write_text(json.dumps({"machine": about, "runs": self.results}, indent=1) + "\n", encoding="utf-8")


def steps_of(run_dir: Path) -> dict[str, object]:
    """Seconds by phase of a run's last step, its peak of device memory, and whether its losses were finite."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["step"]]
    if not steps:
        return {"steps": 0}
    last = steps[-1]
    seconds = {name: round(value, 3) for name, value in last["seconds"].items()}
    memory = max(line["peak_memory_gib"] for line in steps)
    return {
        "steps": len(steps),
        "seconds_of_last_step": seconds,
        "peak_memory_gib": round(memory, 2),
        "loss": last["loss"],
    }


def main() -> None:
    """Make the files, run the commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=720, help="side of training pictures")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.folder, args.out)
    start = time.perf_counter()
    settings = make_files(args.folder, args.tiny) | {"model.tokenizers": str(args.tokenizers)}
    print(f"files: {time.perf_counter() - start:.0f} s", flush=True)
    given = [f"{name}={value}" for name, value in settings.items()]
    side, steps = (64, 2) if args.tiny else (args.size, 3)
    size = [f"data.height={side}", f"data.width={side}"]
    quick = [*given, *size, f"optim.steps={steps}", "optim.accumulation=1", "output.preview_every=0"]
    quick += ["output.tensorboard=false", f"rollout.num_steps={2 if args.tiny else 25}"]
    runs.run("srpo train --check", "train", "flux-dev-lora", *quick, "--check")
    runs.run("srpo encode, T5 in bfloat16", "encode", "flux-dev-lora", *quick)
    for preset, cap in (("flux-dev-lora", 0.0), ("flux-dev-lora-24gb", 24.0)):
        run_dir = args.folder / preset
        runs.run(f"srpo train {preset}, {side} x {side}", "train", preset, *quick, f"output.dir={run_dir}", cap_gb=cap)
        if (run_dir / "metrics.jsonl").is_file():
            runs.add(**steps_of(run_dir))
    run_dir, pictures = str(args.folder / "flux-dev-lora"), str(args.folder / "pictures")
    prompt, drawn = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]], (64 if args.tiny else 1024)
    drawn_size = [f"data.height={drawn}", f"data.width={drawn}"]
    num = ["--steps", "2" if args.tiny else "50"]
    runs.run(
        "srpo sample, 2 pictures, 1024 x 1024, 50 steps",
        "sample",
        run_dir,
        *prompt,
        *num,
        *drawn_size,
        "--out",
        pictures,
    )
    runs.run("srpo score, HPS v2.1", "score", pictures, "--source", run_dir)
    runs.run("srpo export, the LoRA", "export", run_dir)
    target = str(args.folder / "merged_fp8.safetensors")
    fp8 = ["--what", "transformer", "--format", "comfyui", "--dtype", "scaled-fp8", "--out", target]
    runs.run("srpo export, merged, original names, scaled fp8", "export", run_dir, *fp8)
    runs.run("srpo doctor FILE", "doctor", target)


if __name__ == "__main__":
    main()
