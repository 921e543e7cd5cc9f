"""A run, described once: every setting's name, type, default, help and limits stand here and nowhere else.

Presets, the command line, run.json and ComfyUI's widgets are all made of these fields. Saved graphs are positional:
fields are only appended to a section.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """A setting is unknown or its value can't be used; the message names the setting, the value and the choices."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path as text; ~ is the user's home."""


class ModelConfig(Section):
    family: str = Field(
        "flux", description="model family: a name in srpo_core.models.MODELS, or module:function for your own"
    )
    path: PathText | None = Field(
        None,
        description="the whole model: a folder in diffusers format, or one .safetensors file that holds transformer,"
        " autoencoder and text encoders (a ComfyUI checkpoint); parts named below replace its own, and where all are"
        " named it isn't needed; the miniature family brings its own",
    )
    transformer: PathText | None = Field(
        None,
        description="transformer: a folder in diffusers format, or a .safetensors file under diffusers' or the original"
        " names, fp8 too",
    )
    autoencoder: PathText | None = Field(
        None,
        description="autoencoder: a folder in diffusers format, or a .safetensors file under diffusers' or the original"
        " names (ae.safetensors)",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="precision of the forward and backward passes; trained weights are kept in model.trained_memory,"
        " those that a LoRA leaves frozen in this precision",
    )
    recompute: bool | Literal["auto"] = Field(
        True,
        description="recompute transformer and decoder blocks in the backward pass: less memory, about a third more"
        " time; auto recomputes those whose activations don't fit into the memory that a GPU has free (the same"
        " numbers)",
    )
    clip: PathText | None = Field(
        None, description="CLIP-L text encoder: a folder, or a .safetensors file (clip_l.safetensors)"
    )
    t5: PathText | None = Field(
        None, description="T5-XXL text encoder: a folder, or a .safetensors file (t5xxl_fp16.safetensors), fp8 too"
    )
    tokenizers: PathText | None = Field(
        None,
        description="folder with `tokenizer` (CLIP) and `tokenizer_2` (T5); unset: those of `path` or beside the text"
        " encoders' folders, of ComfyUI if this project lies in its custom_nodes or COMFYUI_PATH names it, or of the"
        " Hugging Face cache (srpo download tokenizers)",
    )
    t5_memory: Literal["full", "8bit", "offload"] = Field(
        "full",
        description="how T5 is held while prompts are encoded: in model.dtype; its matrices in 8 bits, expanded one at"
        " a time (half the memory; those of an fp8 file as they are, others rounded: embeddings about 4 % off); or on"
        " the host, a layer at a time on the device (slow, least memory)",
    )
    lora: PathText | None = Field(
        None,
        description="LoRA .safetensors file, under any trainer's names, merged into the transformer first: training"
        " goes on from there; the run's own LoRA is exported alone and needs this one too, its transformer holds both",
    )
    lora_strength: float = Field(1.0, ge=-10, le=10, description="strength with which model.lora is merged")
    frozen_memory: Literal["full", "8bit", "fp8", "4bit"] = Field(
        "full",
        description="how the matrices that a LoRA leaves frozen are held: in model.dtype; or, expanded when they are"
        " used (model.recompute is then worth its time), in 8 bits as whole numbers (half the memory, rounded to 1/254"
        " of each row's largest), in fp8 (half the memory, rounded to 1/16 of each weight; an fp8 file's as they are)"
        " or in 4 bits (NF4: a quarter of the memory, about 9 % off)",
    )
    trained_memory: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="how trained weights and their gradients are held; bfloat16 takes half the memory: each update is"
        " rounded up or down at random, so that small ones count on average; an average (optim.ema_decay) is then held"
        " in float32 on the host",
    )
    compile: bool = Field(
        False,
        description="compile the transformer's blocks (torch.compile): about a third faster on a GPU; the first step"
        " takes about a minute longer, less in the next run, which finds the compiled code in ~/.cache/srpo (or"
        " TORCHINDUCTOR_CACHE_DIR). Where it can't be done, the run goes on without",
    )
    attention: Literal["auto", "native", "flash", "cudnn", "efficient", "math", "flash-attn-2", "flash-attn-3"] = Field(
        "auto",
        description="attention kernels on an NVIDIA GPU. auto: the fastest of those that agree with float32 on the"
        " run's shape, for rollouts and for the gradient step each, measured at the start; native: PyTorch's own"
        " choice; flash, cudnn, efficient, math: PyTorch's kernels; flash-attn-2 and flash-attn-3 need their packages."
        " The gradient step never takes cudnn, whose backward pass is wrong on some shapes",
    )


class DataConfig(Section):
    prompts: PathText = Field(
        "builtin",
        description="training prompts: a text file with one per line, a .csv, .jsonl, .json or .parquet file, a Hugging"
        " Face dataset's folder (data.prompt_column), a folder of images with captions, or `builtin` for the family's"
        " own",
    )
    photos: PathText | None = Field(
        None,
        description="folder of images with captions (same name, .txt, or a metadata.jsonl, metadata.csv or captions.csv"
        " with file_name and text), folders in it included, to train on instead of rollouts of `prompts`; each is"
        " turned upright, scaled until it just covers its size and cropped around its centre",
    )
    eval_prompts: PathText = Field(
        "builtin",
        description="held-out prompts of previews and evaluation, in the forms of `prompts`; left out of `prompts`"
        " where they occur there",
    )
    height: int = Field(720, ge=16, le=8192, description="image height in pixels")
    width: int = Field(720, ge=16, le=8192, description="image width in pixels")
    batch_size: int = Field(1, ge=1, le=4096, description="prompts per micro-batch on each device")
    prompt_column: str | None = Field(
        None, description="column of a table of prompts; unset: the first of prompt, caption and text that is there"
    )
    photo_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of micro-batches that train on `photos`, where they are given; others roll out `prompts`;"
        " kept exactly over the run, in turns drawn by the seed",
    )
    bucket_step: int = Field(
        0,
        ge=0,
        le=512,
        description="0: every photo becomes width x height; else photos keep about their shape: each takes the size, in"
        " multiples of this many pixels, with the nearest aspect ratio between 9:21 and 21:9 and at most width x"
        " height pixels; a batch holds one size (64 suits most models)",
    )
    embeddings: PathText | None = Field(
        None,
        description="folder of the cache of prompt embeddings, which runs can share (srpo encode fills it); unset:"
        " `embeddings` in output.dir",
    )


class RolloutConfig(Section):
    num_steps: int = Field(25, ge=1, le=1000, description="Euler steps of the rollout without gradient")
    guidance: float = Field(1.0, ge=0, le=100, description="distilled guidance during the rollout")
    shift: float = Field(
        3.0, gt=0, le=100, description="schedule shift s in s*t / (1 + (s-1)*t): of rollouts, levels and previews"
    )
    same_noise: bool = Field(
        True,
        description="draw the same rollout noise on every rank (as published); the levels differ by rank in any case",
    )
    precision: Literal["model", "fp8"] = Field(
        "model",
        description="numbers of the rollout's matrix products: model.dtype, or fp8 (e4m3, a scale for each row of"
        " weights and activations), about a quarter faster where model.compile is on; needs an NVIDIA GPU from Ada or"
        " Hopper on, and memory for a copy of the blocks' matrices in 8 bits (8.5 GB of FLUX.1-dev) as long as a"
        " rollout lasts, beside model.frozen_memory=8bit too. A LoRA is merged into the copy. Matrices that"
        " model.frozen_memory=fp8 holds need no copy: they are multiplied as they are, with the LoRA beside them."
        " Previews and the gradient step stay in model.dtype",
    )
    calls: int = Field(
        0,
        ge=0,
        le=1000,
        description="model calls in a rollout of num_steps: the velocities of its other steps are extrapolated from the"
        " last two calls; 0 calls the model in every step",
    )
    at_once: int = Field(
        1,
        ge=1,
        le=4096,
        description="micro-batches of an optimizer step (optim.accumulation) that are rolled out together: faster on a"
        " GPU that one leaves idle, with memory for so many at once",
    )
    cuda_graph: bool = Field(
        True,
        description="record a model call as a CUDA graph and play it in the place of the others, with the same numbers:"
        " a busy host no longer keeps the GPU waiting. On NVIDIA GPUs, where weights are in the same place in each"
        " step, where one leaves memory for it (0.3 to 0.4 GiB at 720 x 720) and calls send nothing to other processes",
    )

    @model_validator(mode="after")
    def _calls(self) -> RolloutConfig:
        if self.calls > self.num_steps or self.calls == 1 < self.num_steps:
            raise ValueError(
                f"calls={self.calls} of num_steps={self.num_steps}: 0, or 2 to num_steps; one call tells no slope"
            )
        return self


class AlignConfig(Section):
    branches: list[Literal["denoise", "inversion"]] = Field(
        ["denoise", "inversion"],
        min_length=1,
        description="branches of a step, in order; without inversion there is no regulariser",
    )
    range_start: int = Field(
        5, ge=0, le=1000, description="entry of the schedule where the training range starts (high noise)"
    )
    range_end: int = Field(
        25, ge=1, le=1000, description="entry of the schedule where the training range ends (lower noise)"
    )
    schedule_steps: int = Field(
        50, ge=2, le=1000, description="length of the schedule that the range's entries refer to"
    )
    levels: int = Field(1000, ge=20, le=100_000, description="L: the training range is cut into this many levels")
    step_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="length of the gradient step as a part of the training range"
    )
    draws_per_rollout: int = Field(1, ge=1, le=64, description="levels trained on from one rollout")
    at_once: int = Field(
        1,
        ge=1,
        le=128,
        description="branches and draws of a micro-batch that are trained on in one pass: 2 takes both branches, which"
        " is faster on a GPU that one leaves idle or whose host is busy, and has processes that hold parts of the model"
        " exchange gradients half as often; with memory for so many pictures",
    )
    guidance: float = Field(3.5, ge=0, le=100, description="distilled guidance of the gradient step")
    k_denoise: tuple[float, float] = Field(
        (0.1, 0.25),
        description="share of absolute reward in the denoise branch, at the low-noise and at the high-noise end of the"
        " range; a first number slightly above k_inversion's second keeps structure",
    )
    k_inversion: tuple[float, float] = Field(
        (0.3, 0.01),
        description="the same for the inversion branch; a first number slightly above k_denoise's second cures"
        " over-saturation",
    )

    @model_validator(mode="after")
    def _range(self) -> AlignConfig:
        if not self.range_start < self.range_end < self.schedule_steps:
            entries = f"{self.range_start}, {self.range_end}, {self.schedule_steps}"
            raise ValueError(f"range_start < range_end < schedule_steps must hold, got {entries}")
        if len(set(self.branches)) != len(self.branches):
            raise ValueError(f"branches names a branch twice: {self.branches}")
        return self


class MoreReward(Section):
    """A further reward in the loss."""

    name: str = Field(
        description="a name in srpo_core.rewards.REWARDS, or your own as file.py:function or module:function"
    )
    path: PathText | None = Field(None, description="its weights, where it needs some: a file or a folder")
    margin: float = Field(0.7, description="its loss is relu(margin - score)")
    scale: float = Field(1.0, gt=0, description="its values become (value - offset) * scale before anything else")
    offset: float = Field(0.0, description="see scale")
    weight: float = Field(1.0, gt=0, le=1000, description="weight of its loss, and of its value in a mixture")
    fit: Literal["crop", "pad"] = Field("crop", description="how images fit its square: see reward.fit")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="its precision: see reward.dtype")


class RewardConfig(Section):
    name: str = Field(
        "clip",
        description="reward to train on: a name in srpo_core.rewards.REWARDS, or your own as file.py:function or"
        " module:function",
    )
    path: PathText | None = Field(
        None,
        description="its weights, where it needs some: a file or a folder; unset: where `srpo download` puts them, in"
        " ComfyUI's models/srpo_rewards or the Hugging Face cache",
    )
    liked: list[str] = Field(
        ["Natural-lighting", "Detail", "Detailed", "Real"],
        min_length=1,
        description="control words to move toward; one a step, in turn",
    )
    disliked: list[str] = Field(
        ["Concept art", "Painting", "Anime", "Flat", "Oil"],
        min_length=1,
        description="control words to move away from; one a step, in turn",
    )
    margin: float = Field(0.7, description="the loss is relu(margin - score): above it an image is good enough")
    scale: float = Field(1.0, gt=0, description="its values become (value - offset) * scale before anything else")
    offset: float = Field(0.0, description="see scale; it cancels out of relative scores, but for their share k")
    weight: float = Field(1.0, gt=0, le=1000, description="weight of its loss, and of its value in a mixture")
    fit: Literal["crop", "pad"] = Field(
        "crop",
        description="how images fit the reward's square: crop (short side to it, centre kept; for training) or pad"
        " (long side to it, black beside; the official HPS scoring)",
    )
    more: list[MoreReward] = Field(
        [],
        description="further rewards in the loss, each with name, path, margin, scale, offset, weight, fit and dtype:"
        " [{name: pickscore, path: ..., scale: 0.05}]",
    )
    contrast: tuple[str, str] = Field(
        ("Realistic photo", "CG Render"),
        description="two wordings whose difference in reward is reported as `sgp`: realistic less artificial; never"
        " trained on",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="precision that a CLIP reward (hpsv2, pickscore, clip) is held and computed in; bfloat16 takes half"
        " the memory, 1.8 GiB less for HPS: scores about 0.001 off, the difference of two wordings 2 %",
    )


class OptimConfig(Section):
    steps: int = Field(100, ge=1, le=1_000_000, description="optimizer steps of the whole run")
    lr: float = Field(5e-6, gt=0, le=1, description="AdamW learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which lr rises linearly to its full height")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of lr after warm-up: constant, or falling toward 0 at the last step"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW betas")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(0.1, gt=0, description="a longer gradient is scaled down to this norm")
    accumulation: int = Field(1, ge=1, le=4096, description="micro-batches per optimizer step")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the running average of the trained weights, less in early steps: (1 + step) / (10 +"
        " step); previews and exports use the average; 0 keeps none",
    )
    states: Literal["float32", "8bit"] = Field(
        "float32",
        description="how AdamW's two moments are held: in float32, or in 8 bits each (a quarter of the memory): blocks"
        " of 256 numbers share a scale, and codes are rounded up or down at random (updates about 5 % off)",
    )


class LoraConfig(Section):
    rank: int = Field(0, ge=0, le=1024, description="LoRA rank; 0 trains all parameters")
    alpha: float | None = Field(
        None, gt=0, description="LoRA alpha: its effect is scaled by alpha / rank; unset means alpha = rank"
    )
    targets: str = Field("all", description="group of layers that get a LoRA: attention, mlp or all")
    start: PathText | None = Field(
        None,
        description="LoRA .safetensors file whose matrices training starts from, instead of one without effect; its"
        " rank and layers must be those of lora.rank and lora.targets, its effect is kept whatever its alpha",
    )


class ParallelConfig(Section):
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1, mps, ...; auto takes the first of cuda, mps and cpu that is there"
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="processes on this machine, one for each GPU: each trains on prompts and levels of its own, and"
        " their gradients are averaged",
    )
    gpus: str = Field(
        "auto",
        description="GPUs to train on, as numbers such as 0,1; auto takes one for each process, those with the"
        " most free memory that no other run works on",
    )
    share_gpu: bool = Field(False, description="train on a GPU though another run works on it")
    deterministic: bool = Field(
        False,
        description="only take kernels that give the same bits each time, so that on one kind of GPU and one version of"
        " torch a run repeats exactly, as it does on the CPU anyway; slower, and attention isn't measured",
    )
    nodes: int = Field(1, ge=1, le=4096, description="machines that train together, each with `processes` processes")
    node_rank: int = Field(0, ge=0, description="which of the machines this one is: 0, 1, ...")
    rendezvous: str = Field(
        "", description="host:port of machine 0, where the machines find each other, such as 10.0.0.5:29500"
    )
    strategy: Literal["replicate", "shard", "hybrid"] = Field(
        "replicate",
        description="what each of several processes holds of the model: all of it; its part of every block and of its"
        " optimizer state, gathered when the block is used (FSDP); or hybrid: a part within a machine, the same on each"
        " machine",
    )
    context: int = Field(
        1,
        ge=1,
        le=64,
        description="processes that share one picture's tokens (Ulysses), for pictures too large for one GPU; they"
        " train on the same prompts, so that a step has 1 / context of the pictures",
    )
    offload: bool = Field(
        False,
        description="keep the parts of a sharded model and its optimizer on the host: least GPU memory, slow steps",
    )
    gathered: Literal["layer", "rollout", "step"] = Field(
        "layer",
        description="how long a sharded model's gathered weights stay: while a block is used; from the first to the"
        " last model call of a rollout; or for the whole step: fewer transfers, and room for all of the model in"
        " model.dtype",
    )
    gradients: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="numbers in which processes sum up the gradients of a model in parts: bfloat16 sends half as much,"
        " rounded to 8 bits of its digits (0.12 % off in a test of two); what several passes give is added up in"
        " float32, and only between hybrid's machines in this too",
    )


class OutputConfig(Section):
    dir: PathText = Field(
        "runs/srpo", description="folder of the run: run.json, metrics.jsonl, checkpoints, previews, exports"
    )
    checkpoint_every: int = Field(
        10, ge=1, description="steps between checkpoints; the best preview and the last step have theirs in any case"
    )
    keep_checkpoints: int = Field(1, ge=1, description="newest checkpoints kept, beside the best")
    preview_every: int = Field(10, ge=0, description="steps between previews; 0 draws none")
    preview_prompts: int = Field(
        4, ge=1, le=256, description="held-out prompts drawn as previews, always with the same noise"
    )
    preview_steps: int = Field(25, ge=1, le=1000, description="Euler steps of previews and evaluation")
    preview_guidance: float = Field(3.5, ge=0, le=100, description="distilled guidance of previews and evaluation")
    best_by: Literal["relative", "reward"] = Field(
        "relative",
        description="preview score that names the best checkpoint: liked minus disliked wordings, or the plain prompt's"
        " reward",
    )
    evaluate_prompts: int = Field(
        0,
        ge=0,
        description="held-out prompts drawn and scored before and after training, with the same noise; 0 skips it",
    )
    tensorboard: bool = Field(True, description="write TensorBoard event files beside metrics.jsonl")
    result: PathText | None = Field(
        None,
        description="a .safetensors file for the trained weights when the run ends, as ComfyUI and diffusers load them:"
        " its LoRA, or the whole transformer. None that is there is replaced: a run that went on writes another one"
        " beside it, with its step in the name",
    )


class RunConfig(Section):
    """Everything that tells one run from another."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random number of the run")

    def aligned(self) -> int:
        """What is aligned of a micro-batch: its branches, for each draw."""
        return len(self.align.branches) * self.align.draws_per_rollout

    def backward_passes(self) -> int:
        """Of an optimizer step."""
        return self.optim.accumulation * math.ceil(self.aligned() / self.align.at_once)


def flat(data: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name with its sections, value) of every entry of a nested dict."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield prefix + name, value


def nearest(name: str, choices: Sequence[str]) -> str:
    """ "; did you mean 'x'?" for the closest choice, then the choices themselves when they are few."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return hint + (f" (choices: {', '.join(choices)})" if len(choices) <= 20 else "")
