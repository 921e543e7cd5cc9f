"""What the pack loads at ComfyUI's start, and what ComfyUI's memory management does with our rewards: a program that
imports ComfyUI and this pack.

    python memory_in_comfyui.py CHECKOUT FOLDER

There is no GPU here. The card is a second name of the CPU, "cpu:0", which ComfyUI tells from "cpu"; how much is free on
it is counted from what ComfyUI has loaded there. FOLDER/report.json then holds what happened in each scene.
"""

import asyncio
import gc
import importlib.util
import json
import os
import sys
import time
import weakref
from pathlib import Path

import torch

PACK = Path(__file__).parents[2]
CARD, CPU = torch.device("cpu", 0), torch.device("cpu")
MIB = 1 << 20
PROMPTS = ["two red stars at night", "a blue ring in the desert", "a white box"]
report = {}


def scene(function):
    """The function's result stands in the report under its name."""
    with torch.inference_mode():
        report[function.__name__] = function()


class Card:
    """Makes ComfyUI see a card of a number of bytes."""

    def __init__(self, management):
        self.management, self.bytes = management, 0
        self._of_the_cpu = management.get_free_memory
        management.get_torch_device = lambda: CARD
        management.get_total_memory = lambda device=None, torch_total_too=False: self.bytes
        management.get_free_memory = self.free

    def loaded(self):
        """[class, bytes on the card, bytes] of each model that is there, by size."""
        models = [one.model for one in self.management.current_loaded_models if one.device == CARD]
        return sorted([type(model.model).__name__, model.loaded_size(), model.model_size()] for model in models)

    def free(self, device=None, torch_free_too=False):
        if (device or CARD) != CARD:
            return self._of_the_cpu(device, torch_free_too)
        free = self.bytes - sum(size for _, size, _ in self.loaded())
        return (free, free) if torch_free_too else free

    def with_room_for(self, bytes_of_weights):
        """A card on which weights of so many bytes find room, beside what ComfyUI keeps free, and 4 MiB more don't."""
        self.management.unload_all_models()
        self.bytes = int(self.management.minimum_inference_memory() + 1.1 * bytes_of_weights + 2 * MIB)
        return self


def load_pack():
    """The pack's nodes, as ComfyUI gets them at its start."""
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)

    async def nodes():
        return await (await pack.comfy_entrypoint()).get_node_list()

    return asyncio.run(nodes())


def main():  # one scene after the other
    checkout, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["HF_HUB_CACHE"] = str(folder / "hub")
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(folder)
    import comfy.model_management as management
    import folder_paths
    from comfy.model_patcher import ModelPatcher

    folders = [folder / name for name in ("given", "models/srpo_rewards", "models/text_encoders")]
    for i, one in enumerate(folders):
        one.mkdir(parents=True)
        for name in (f"{i}.safetensors", f"{i}.txt"):
            (one / name).touch()
    folder_paths.add_model_folder_path("srpo_rewards", str(folders[0]))  # as extra_model_paths.yaml does, at start
    # what ComfyUI has loaded before it comes to custom nodes; later, `utils` would be another module
    for name in ("utils.extra_config", "nodes", "comfy_api.latest"):
        importlib.import_module(name)
    before, begin = set(sys.modules), time.process_time()
    report["nodes"] = len(load_pack())
    report["seconds"] = time.process_time() - begin
    report["imported"] = sorted({name.split(".")[0] for name in set(sys.modules) - before})
    from pack.nodes.rewards import LoadReward, MixRewards

    from srpo_core.config import RewardConfig
    from srpo_core.rewards import load_reward

    images = torch.rand(3, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    card = Card(management)
    card.bytes = 1 << 40

    report["choices"] = LoadReward.GET_SCHEMA().inputs[1].options
    report["answers"] = {file: LoadReward.validate_inputs("hpsv2", file) for file in (
        "0.safetensors", "1.safetensors", "text_encoders/2.safetensors", "2.safetensors", "auto", None,
    )}  # fmt: skip

    def load(device="auto", offload="when needed"):
        return LoadReward.execute("miniature", "auto", "official", device, offload).args[0]

    def score(reward):
        return reward(images, PROMPTS)

    with torch.inference_mode():
        expected = score(load_reward(RewardConfig(name="miniature"), "cpu"))
        size = management.module_size(load().held[0].module)
    report["size"] = size

    def equal(values):
        return bool(torch.allclose(values, expected, atol=1e-6))

    @scene
    def scores():
        one = load()
        nothing = card.loaded()
        right = equal(score(one.reward))
        return {"before": nothing, "right": right, "loaded": card.loaded(), "device": str(one.held[0].weights.device)}

    @scene
    def evicted():
        one = load()
        card.with_room_for(2 * size)
        score(one.reward)
        other = ModelPatcher(torch.nn.Sequential(torch.nn.Linear(size // 4096, 1024, bias=False)), CARD, CPU)
        alone = card.loaded()
        management.load_models_gpu([other])
        both = card.loaded()
        card.bytes -= size // 2  # the other one again, which is there, and the reward no longer fits beside it
        management.free_memory(management.minimum_inference_memory(), CARD, [
            loaded for loaded in management.current_loaded_models if loaded.model is other
        ])  # fmt: skip
        after = card.loaded()
        return {"alone": alone, "both": both, "after": after, "device": str(one.held[0].weights.device),
                "right": equal(score(one.reward)), "again": card.loaded()}  # fmt: skip

    @scene
    def mixture():
        """Of three on a card for one: at no time are there two, and each is brought once."""
        ones = [load() for _ in range(3)]
        card.with_room_for(size)
        mixed = MixRewards.execute(
            values="raw", reward_1=ones[0], weight_1=1.0, reward_2=ones[1], weight_2=3.0, reward_3=ones[2]
        ).args[0]
        there, many = [], images.repeat(4, 1, 1, 1)
        with mixed.on_device(lambda count: there.append([count, len(card.loaded())])) as (reward, device):
            values = reward(many, PROMPTS * 4)
        return {"right": bool(torch.allclose(values, expected.repeat(4), atol=1e-6)), "there": there,
                "device": str(device), "names": [part.name for part in mixed.parts]}  # fmt: skip

    @scene
    def after_use():
        one = load(offload="after use")
        card.with_room_for(2 * size)
        score(one.reward)
        alone = card.loaded()
        with one.on_device() as (reward, _):
            score(reward)
            within = card.loaded()
        return {"alone": alone, "within": within, "after": card.loaded(), "right": equal(score(one.reward))}

    @scene
    def after_an_error():
        one = load(offload="after use")
        try:
            one.reward(images, PROMPTS[:2])
        except ValueError as error:
            return {"error": str(error), "after": card.loaded(), "right": equal(score(one.reward))}

    @scene
    def too_small():
        card.with_room_for(size // 2)
        one = load()
        return {"device": str(one.held[0].device), "right": equal(score(one.reward)), "loaded": card.loaded()}

    @scene
    def cpu():
        card.with_room_for(size)
        one = load(device="cpu")
        return {"device": str(one.held[0].device), "right": equal(score(one.reward)), "loaded": card.loaded()}

    @scene
    def novram():
        """As with ComfyUI's option --novram: nothing is kept on the card."""
        card.with_room_for(size)
        state, management.vram_state = management.vram_state, management.VRAMState.NO_VRAM
        one = load()
        right = equal(score(one.reward))
        management.vram_state = state
        return {"device": str(one.held[0].device), "right": right, "loaded": card.loaded()}

    @scene
    def no_room_after_all():
        """Another program has taken the card's memory: what torch then raises when weights are moved there."""
        card.with_room_for(size)
        one = load()
        weights = one.held[0].weights

        def to(device, *args, **kwargs):
            if torch.device(device) == CARD:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.nn.Module.to(weights, device, *args, **kwargs)

        weights.to = to
        with one.on_device() as (reward, device):
            right = equal(score(reward))
        del weights.to
        loaded = card.loaded()
        again = equal(score(one.reward))
        return {"right": right and again, "device": str(device), "loaded": loaded, "loaded_again": card.loaded()}

    @scene
    def let_go():
        """When a node's output leaves ComfyUI's cache, without waiting for Python's garbage collector."""
        card.with_room_for(2 * size)
        one = load()
        score(one.reward)
        before = card.loaded()
        weights = [weakref.ref(parameter) for parameter in one.held[0].module.parameters()]
        gc.collect()
        gc.disable()
        del one
        left = sum(weight() is not None for weight in weights)
        gc.enable()
        return {"before": before, "left": left, "loaded": card.loaded()}

    @scene
    def unloaded():
        one = load()
        score(one.reward)
        before = card.loaded()
        with torch.inference_mode(False):  # as where ComfyUI answers POST /free
            management.unload_all_models()
        return {"before": before, "loaded": card.loaded(), "device": str(one.held[0].weights.device),
                "right": equal(score(one.reward))}  # fmt: skip

    @scene
    def interrupted():
        one = load(offload="after use")
        many, there = images.repeat(8, 1, 1, 1), []

        def stop(count):
            there.append(count)
            management.interrupt_current_processing()

        try:
            with one.on_device(stop) as (reward, _):
                reward(many, PROMPTS * 8)
        except management.InterruptProcessingException:
            return {"read": there, "loaded": card.loaded()}

    @scene
    def published():
        """HPS v2.1 and PickScore, but narrow: found by `auto` in models/srpo_rewards and in the Hugging Face cache."""
        sys.path.append(str(PACK / "tests"))
        import tiny_clip
        from safetensors.torch import save_file

        from srpo_core.rewards import hpsv2, pickscore

        hpsv2.ARCHITECTURE, pickscore.IMAGE_WIDTH = tiny_clip.register(folder), tiny_clip.VISION
        state = tiny_clip.weights()
        snapshot = folder / "hub" / "models--yuvalkirstain--PickScore_v1" / "snapshots" / "one"
        tiny_clip.transformers_config().save_pretrained(snapshot)
        save_file(tiny_clip.transformers_weights(state), snapshot / "model.safetensors")
        (snapshot / "merges.txt").touch()
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("one")
        paths = {
            "hpsv2": tiny_clip.save_checkpoint(folders[1] / "HPS_v2.1_compressed.pt", state), "pickscore": snapshot,
        }  # fmt: skip
        found = {}
        for name, fit in (("hpsv2", "pad"), ("pickscore", "crop")):
            output = LoadReward.execute(name, "auto", "official", "auto", "when needed")
            right = load_reward(RewardConfig(name=name, path=str(paths[name]), fit=fit), "cpu")(images, PROMPTS)
            equal = bool(torch.allclose(score(output.args[0].reward), right, atol=1e-5)) and right.std().item() > 1e-4
            found[name] = {"right": equal, "told": str(paths[name]) in output.ui["text"][0]}
        return found

    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
