"""Compiled blocks: the same numbers as without, one compilation for blocks of a kind, and a way on where it fails."""

from __future__ import annotations

from shutil import which
from types import SimpleNamespace

import pytest
import torch
from tiny import encode_text, tiny_config, tiny_flow
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError

from srpo_core import compiling
from srpo_core.assemble import assemble
from srpo_core.compiling import Compiler, make_compiler
from srpo_core.config import LoraConfig
from srpo_core.errors import TrainingError
from srpo_core.learner import Parts
from srpo_core.lora import add_lora
from srpo_core.metrics import Clock
from srpo_core.models.flux import BLOCKS
from srpo_core.parallel import World
from srpo_core.rollout_copy import RolloutCopy
from srpo_core.speed import TOKENS_SHARED, speed_up
from srpo_core.weights.compressed import fill_compressed

PROMPTS = encode_text(["a red cat", "a blue dog"])
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing compiled before, and settings as they were afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch({}), torch._functorch.config.patch({}):
        yield
    torch._dynamo.reset()


def compiler(said, backend="aot_eager"):
    """One that traces and derives as the real one does, but generates no code, which takes long."""
    made = Compiler(said.append)
    made.backend = backend
    return made


def outcome(flow):
    """A velocity, one without gradient, and the gradient of what is trained."""
    flow.module.zero_grad(set_to_none=True)
    sigma = torch.tensor([0.9, 0.4])
    velocity = flow.velocity(LATENTS, sigma, PROMPTS, 3.5)
    velocity.square().sum().backward()
    with torch.no_grad():
        plain = flow.velocity(LATENTS, sigma, PROMPTS, 3.5)
    return [velocity.detach(), plain, *(p.grad.clone() for p in flow.module.parameters() if p.requires_grad)]


def frozen_flow(memory="full", dtype=torch.float32):
    """One with a LoRA that has an effect, beside matrices held in `memory`."""
    flow = tiny_flow(dtype)
    if memory != "full":
        state = {name: tensor.clone() for name, tensor in flow.module.state_dict().items()}
        fill_compressed(flow.module, iter(state.items()), dtype, "cpu", {}, BLOCKS, memory)
    add_lora(flow.module, LoraConfig(rank=4), flow.lora_targets["all"], torch.Generator().manual_seed(3))
    for name, parameter in flow.module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, 0.05)
    return flow


def recomputed_flow():
    flow = tiny_flow()
    flow.module.enable_gradient_checkpointing()
    return flow


def test_the_same_velocity_and_gradient():
    exact, said, flow = outcome(tiny_flow()), [], tiny_flow()
    compiler(said).blocks(flow.module, flow.block_types)
    torch.testing.assert_close(outcome(flow), exact, **CLOSE)
    assert not said and counters["stats"]["unique_graphs"] >= 4  # both kinds of blocks, with gradient and without


@pytest.mark.skipif(not any(map(which, ("g++", "clang++"))), reason="no C++ compiler on this machine")
def test_real_code_gives_the_same_numbers():
    said, layer = [], torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16), torch.nn.GELU("tanh"))
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(layer(inputs).square().sum(), layer.parameters())
    compiler(said, "inductor").blocks(layer, (torch.nn.Sequential,))
    torch.testing.assert_close(torch.autograd.grad(layer(inputs).square().sum(), layer.parameters()), exact, **CLOSE)
    assert not said and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "make",
    [recomputed_flow, lambda: frozen_flow("8bit")],
    ids=["recomputed", "LoRA beside 8 bits"],
)
def test_the_same_with_what_else_a_block_can_have(make):
    exact, said, flow = outcome(make()), [], make()
    compiler(said).blocks(flow.module, flow.block_types)
    torch.testing.assert_close(outcome(flow), exact, **CLOSE)
    assert not said and counters["stats"]["unique_graphs"] >= 4


def test_autocast_is_compiled_too():
    exact, said, flow = outcome(tiny_flow(torch.bfloat16)), [], tiny_flow(torch.bfloat16)
    compiler(said).blocks(flow.module, flow.block_types)
    ours = outcome(flow)
    assert not said
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


def test_a_copy_in_fp8_is_compiled_with_codes_made_anew():
    said, flow = [], tiny_flow()
    made = compiler(said)
    plain, compiled = RolloutCopy(flow, torch.float32), RolloutCopy(flow, torch.float32, made)
    for _ in range(2):
        with torch.no_grad(), plain.filled() as one, compiled.filled() as other:
            sigma = torch.tensor([0.9, 0.4])
            exact, ours = (each.velocity(LATENTS, sigma, PROMPTS, 1.0) for each in (one, other))
            torch.testing.assert_close(ours, exact, rtol=1e-2, atol=1e-2)
            for parameter in flow.module.parameters():
                parameter.mul_(1.05)
    graphs = counters["stats"]["unique_graphs"]
    assert not said and graphs >= 2
    with compiled.filled():
        pass
    assert counters["stats"]["unique_graphs"] == graphs  # new codes need no new code


@pytest.mark.parametrize("memory", ["full", "8bit", "fp8", "4bit"])
def test_blocks_of_a_kind_share_their_code(memory):
    """Also those with matrices in fewer bits beside a LoRA, with gradient and without."""
    from diffusers import FluxTransformer2DModel

    from srpo_core.models.flux import FluxFlow

    def graphs(blocks):
        torch._dynamo.reset()
        counters.clear()
        module = FluxTransformer2DModel(
            in_channels=16, num_layers=blocks, num_single_layers=blocks, attention_head_dim=64, num_attention_heads=1,
            joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
        flow, said = FluxFlow(module, 2), []
        if memory != "full":
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            fill_compressed(module, iter(state.items()), torch.float32, "cpu", {}, BLOCKS, memory)
            add_lora(module, LoraConfig(rank=4), flow.lora_targets["all"], torch.Generator().manual_seed(3))
        compiler(said).blocks(module, flow.block_types)
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                flow.velocity(LATENTS, torch.tensor([0.9, 0.4]), PROMPTS, 1.0)
        assert not said
        return counters["stats"]["unique_graphs"]

    # the first of a kind may get inputs of other strides, or without gradient
    assert graphs(2) == graphs(5) <= 8


# ---- where it can't be done


def test_what_cannot_be_compiled_runs_as_it_is_and_is_told_once():
    said = []

    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    made = compiler(said)
    function, other = made.function(breaks), made.function(lambda x: x * 2)
    for _ in range(2):
        assert torch.equal(function(torch.zeros(2)), torch.ones(2))
    assert torch.equal(other(torch.ones(2)), torch.full((2,), 2.0))
    assert len(said) == 1 and said[0].startswith("model.compile=true can't be done here, the run goes on without: ")


def test_more_shapes_than_are_compiled_for_run_as_they_are(monkeypatch):
    monkeypatch.setattr(compiling, "VARIANTS", 2)
    said = []
    with torch._dynamo.config.patch(recompile_limit=2):
        function = compiler(said).function(lambda x: x.sin() + 1)
        for count in (2, 3, 4, 5, 2):
            numbers = torch.arange(count).float()
            torch.testing.assert_close(function(numbers), numbers.sin() + 1)
    assert counters["stats"]["unique_graphs"] == 2
    assert said == ["there are too many shapes to compile for: some steps run without compilation"]


def test_an_error_of_the_function_itself_is_its_own():
    function = compiler([]).function(lambda x, y: x @ y)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        function(torch.zeros(2, 3), torch.zeros(2, 3))


def test_devices_that_nothing_is_compiled_for_are_told():
    said = []
    assert make_compiler(torch.device("mps"), said.append) is None
    assert "not on mps" in said[0]


def test_blocks_that_share_a_pictures_tokens_are_not_compiled(tmp_path):
    """The compiler refuses the trade of tokens, and only in the first backward pass."""
    flow, said = tiny_flow(), []
    config = tiny_config(tmp_path, model__compile=True, parallel={"context": 2}, rollout__precision="fp8")
    parts = Parts(flow, None, (), None, None, PROMPTS)
    notes = speed_up(config, parts, World(0, 1, torch.device("cpu")), said.append)
    assert TOKENS_SHARED in notes and compiling.WARNING not in notes and not said
    assert parts.compiler is None and not any("forward" in vars(block) for block in flow.module.modules())


def test_a_run_is_compiled_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "Compiler", lambda *given: with_backend(*given))
    ours = assemble(tiny_config(tmp_path / "ours", model__compile=True))
    exact = assemble(tiny_config(tmp_path / "exact"))
    assert compiling.WARNING in ours.notes and compiling.WARNING not in exact.notes
    for number in (1, 2):
        told, wanted = (trainer.learner.step(number, Clock(lambda: None)) for trainer in (ours, exact))
        assert told.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert told.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)
    assert counters["stats"]["unique_graphs"] >= 4


def test_a_run_says_what_compiling_cost(tmp_path, monkeypatch, capsys):
    """Once, and not where nothing is compiled."""
    monkeypatch.setattr(compiling, "Compiler", lambda *given: with_backend(*given))
    for wanted in (True, False):
        assemble(tiny_config(tmp_path / str(wanted), model__compile=wanted)).train()
        told = capsys.readouterr().out
        assert told.count("compiled: the first step took ") == wanted, told


def test_a_backward_pass_that_cannot_be_compiled_is_tried_again_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiling, "Compiler", lambda *given: with_backend(*given, backend=forward_only))
    ours = assemble(tiny_config(tmp_path / "ours", model__compile=True)).learner
    exact = assemble(tiny_config(tmp_path / "exact")).learner
    for number in (1, 2):
        told, wanted = (learner.step(number, Clock(lambda: None)) for learner in (ours, exact))
        assert told.loss == wanted.loss and told.grad_norm == wanted.grad_norm
    assert capsys.readouterr().out.count("the run goes on without") == 1


def test_of_several_processes_none_goes_on_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "Compiler", lambda *given: with_backend(*given))
    learner, error = (
        assemble(tiny_config(tmp_path, model__compile=True)).learner,
        InductorError(RuntimeError("x"), None),
    )
    learner.world = SimpleNamespace(size=2)

    def step(number, clock):
        raise error

    monkeypatch.setattr(learner, "_step", step)
    with pytest.raises(TrainingError, match=r"model\.compile=true can't be done here \(.*x.*\), set it to false"):
        learner.step(1, Clock(lambda: None))
    error = RuntimeError("mat1 and mat2")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2$"):
        learner.step(1, Clock(lambda: None))


def forward_only(graph, inputs):
    """A compiler whose code for a backward pass turns out to be none."""

    def refuses(graph, inputs):
        raise InductorError(RuntimeError("Scalar out of range"), None)

    return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=refuses)(graph, inputs)


def test_a_forward_pass_that_cannot_be_compiled_after_others_were_is_tried_again_without(tmp_path, monkeypatch, capsys):
    """The blocks before it ran compiled, and would be recomputed without."""
    monkeypatch.setattr(compiling, "Compiler", lambda *given: with_backend(*given, backend=one_kind_alone()))
    ours = assemble(tiny_config(tmp_path / "ours", model__compile=True)).learner
    exact = assemble(tiny_config(tmp_path / "exact")).learner
    for learner in (ours, exact):
        learner.flow.module.enable_gradient_checkpointing()
    for number in (1, 2):
        told, wanted = (learner.step(number, Clock(lambda: None)) for learner in (ours, exact))
        assert told.loss == wanted.loss and told.grad_norm == wanted.grad_norm
    assert capsys.readouterr().out.count("the run goes on without") == 1


def one_kind_alone():
    """A compiler that gives up at the second kind of block that it meets with gradient."""
    seen = []

    def forward(graph, inputs):
        seen.append(graph)
        if len(seen) > 1:
            raise InductorError(RuntimeError("Scalar out of range"), None)
        return graph

    def compiles(graph, inputs):
        plain = {"inference_compiler": lambda graph, _: graph, "bw_compiler": lambda graph, _: graph}
        return aot_autograd(fw_compiler=forward, **plain)(graph, inputs)

    return compiles


def test_what_is_kept_is_learned_anew_once_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "Compiler", lambda *given: with_backend(*given, backend=forward_only))
    learner = assemble(tiny_config(tmp_path, model__compile=True)).learner
    begun = []
    learner._keeping = SimpleNamespace(begin=begun.append)
    learner.step(1, Clock(lambda: None))
    assert begun == [True, False]


def with_backend(*given, backend="aot_eager"):
    made = Compiler(*given)
    made.backend = backend
    return made
