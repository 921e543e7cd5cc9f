"""The miniature's parts, what both sides are asked, and the server with its page and its runs."""

import os
import socket

import pytest
import torch
from comfyui_page import chromium, comfy_page
from comfyui_pictures import drawn
from comfyui_server import Server
from comfyui_side import GUIDANCE

from srpo_core import launch
from srpo_core.config import ModelConfig, RewardConfig
from srpo_core.miniature.captions import random_scenes
from srpo_core.miniature.models import load
from srpo_core.rewards import load_reward
from srpo_core.run_state import read_state


@pytest.fixture(scope="module")
def parts():
    return load(ModelConfig(family="miniature"), "cpu")


@pytest.fixture(scope="module")
def engine():
    """The miniature's parts as the nodes run it: in float32 throughout."""
    return load(ModelConfig(family="miniature", dtype="float32", recompute=False), "cpu")


@pytest.fixture(scope="module")
def reward():
    """The miniature's reward by the engine."""
    return load_reward(RewardConfig(name="miniature"), "cpu")


@pytest.fixture(scope="module")
def base(server):
    """The picture that the miniature draws without a LoRA."""
    return drawn(server)[0]


@pytest.fixture(scope="module")
def question(parts):
    """Two prompts at two levels, on latents that are not square."""
    prompts = parts.text_encoder([scene.caption() for scene in random_scenes(2, seed=3)])
    latents = torch.randn(2, 16, 12, 16, generator=torch.Generator().manual_seed(0))
    sigma, guidance = torch.tensor([0.9, 0.35]), torch.tensor(GUIDANCE)
    return prompts, {"latents": latents, "sigma": sigma, "guidance": guidance, **prompts.embeds}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real server with this pack, shared by all tests; it knows nothing of this machine's Hugging Face cache."""
    base = tmp_path_factory.mktemp("comfyui")
    one = Server(base, environment={"HF_HUB_CACHE": str(base / "hub")})
    try:
        yield one.wait()
    finally:
        one.stop()


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def page(request, browser, server):
    """A page for each of the two ways in which ComfyUI draws nodes."""
    with comfy_page(browser, server, vue_nodes=request.param) as one:
        yield one


@pytest.fixture
def clean(page):
    """The page, which has thrown nothing when the test is over."""
    page.errors.clear()
    yield page
    assert page.errors == []


@pytest.fixture(scope="module")
def runs(server):
    """The server's folder of runs; whatever is at work there ends with the tests."""
    folder = server.base / "output" / "srpo"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    for file in folder.glob("*/state.json"):
        state = read_state(file.parent)
        if state is not None and state.pid != os.getpid() and state.host == socket.gethostname():
            launch.kill(state)
