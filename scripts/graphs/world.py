"""What differs between a graph for FLUX.1-dev and its miniature twin: models, prompts, sizes."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Graph, Wire
from .notes import words_of
from .schemas import Json

HUB = "https://huggingface.co"
SRPO_FILE = "SRPO/diffusion_pytorch_model.safetensors"
FLUX_FILE = "flux1-dev.safetensors"
LORA_FILE = "srpo-lora.safetensors"
T5_FILE, CLIP_FILE, VAE_FILE = "t5xxl_fp16.safetensors", "clip_l.safetensors", "ae.safetensors"
BUILT_IN = "miniature (built in)"

WIDE = 360
GREEN, BLUE, VIOLET, ORANGE, GREY = "#3f7a4f", "#3f789e", "#6b4f9e", "#a1652a", "#555555"


def _model(name: str, path: str, folder: str) -> Json:
    """A file for the page's list of missing models: it offers the download and says which folder is meant."""
    return {"name": name, "url": f"{HUB}/{path}", "directory": folder}


SRPO = _model(SRPO_FILE, "tencent/SRPO/resolve/main/diffusion_pytorch_model.safetensors", "diffusion_models")
FLUX = _model(FLUX_FILE, "black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models")
T5 = _model(T5_FILE, "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors", "text_encoders")
CLIP = _model(CLIP_FILE, "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors", "text_encoders")
VAE = _model(VAE_FILE, "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae")


@dataclass(frozen=True)
class World:
    """Models and sizes of one family of graphs."""

    miniature: bool
    width: int
    height: int
    training_side: int
    """Pixels of the square pictures that training draws."""
    reward: str
    saves: str
    """Folder below ComfyUI's output."""

    def prompt(self, full: str, miniature: str) -> str:
        """One of two prompts: the miniature knows a small vocabulary only."""
        return miniature if self.miniature else full

    def models(self, graph: Graph, core: bool = False, file: Json = SRPO) -> tuple[Wire, Wire, Wire]:
        """(MODEL, CLIP, VAE): the loaders, the transformer's by ComfyUI's own node with `core`."""
        if self.miniature:
            node = graph.add("SRPOMiniature", width=260)
            return node.out("MODEL"), node.out("CLIP"), node.out("VAE")
        return self.transformer(graph, core, file), *self.text_and_vae(graph)

    def transformer(self, graph: Graph, core: bool = False, file: Json = SRPO) -> Wire:
        """A loader of the FLUX transformer in a file."""
        name = file["name"]
        if core:
            given = {"unet_name": name, "weight_dtype": "default"}
            return graph.add("UNETLoader", given, width=WIDE, models=[file]).out()
        return graph.add("SRPOLoadCheckpoint", {"checkpoint": name}, width=WIDE, models=[file]).out()

    def text_and_vae(self, graph: Graph) -> tuple[Wire, Wire]:
        """Loaders of FLUX's text encoders and VAE."""
        given = {"clip_name1": T5_FILE, "clip_name2": CLIP_FILE, "type": "flux", "device": "default"}
        clip = graph.add("DualCLIPLoader", given, width=WIDE, models=[T5, CLIP]).out()
        return clip, graph.add("VAELoader", {"vae_name": VAE_FILE}, width=WIDE, models=[VAE]).out()

    def size(self, graph: Graph, batch: int = 1, square: bool = False) -> Wire:
        """The empty latent of a picture; `square` as in training."""
        width, height = (self.training_side,) * 2 if square else (self.width, self.height)
        given = {"width": width, "height": height, "batch_size": batch}
        return graph.add("EmptySD3LatentImage", given, title="Size and number", width=340).out()

    def beside_loaders(self, graph: Graph) -> None:
        """What follows stands right of the loaders where these are many, below them where they are one."""
        if not self.miniature:
            graph.column()

    def load_reward(self, graph: Graph, name: str | None = None) -> Wire:
        """A reward: the world's own, or another."""
        return graph.add("SRPOLoadReward", {"reward": name or self.reward}, width=320).out()


FULL = World(False, 1280, 720, 720, "hpsv2", "SRPO")
MINIATURE = World(True, 128, 128, 128, "miniature", "SRPO/miniature")


def start_here(graph: Graph, height: float) -> None:
    """The graph's words, from notes/, in the frame left of all others."""
    graph.group("Start here", GREY)
    graph.note(words_of(graph.name), width=460, height=height)


def prompt_box(graph: Graph, text: str, width: float = 340, height: float = 150) -> Wire:
    """One prompt, for the text encoder and for what scores the pictures."""
    return graph.add("PrimitiveStringMultiline", {"value": text}, title="Prompt", width=width, height=height).out()


def encode(graph: Graph, clip: Wire, text: Wire | str, width: float = 340, height: float = 104) -> Wire:
    """A prompt's CONDITIONING."""
    return graph.add("CLIPTextEncode", {"clip": clip, "text": text}, width=width, height=height).out()


def decode(graph: Graph, latents: Wire, vae: Wire) -> Wire:
    """Pictures of latents."""
    return graph.add("VAEDecode", {"samples": latents, "vae": vae}, width=240).out()


def save(graph: Graph, images: Wire, world: World, name: str, width: float = 420, height: float = 340) -> None:
    """Save pictures under the world's folder."""
    graph.add("SaveImage", {"images": images, "filename_prefix": f"{world.saves}/{name}"}, width=width, height=height)
