"""The copy in fp8 that is rolled out: its rounding, whose weights it has, and that it is gone after the rollout."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from tiny import encode_text, tiny_config, tiny_flow
from torch import nn
from torch.nn.utils import parametrize

from srpo_core.assemble import assemble
from srpo_core.checks import check_fit
from srpo_core.config import ConfigError, LoraConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.lora import add_lora
from srpo_core.metrics import Clock
from srpo_core.models.flux import BLOCKS
from srpo_core.rollout import rollout
from srpo_core.rollout_copy import RolloutCopy, shared_copy
from srpo_core.weights.compressed import fill_compressed, fp8_codes
from srpo_core.weights.eight_bit import Rows, to_fp8_rows
from srpo_core.weights.fp8_linear import PARTS, Fp8Linear, check_fp8, scaled_product, takes_fp8

PROMPTS = encode_text(["a red cat", "a blue dog"])
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.9, 0.4])


def velocity(flow):
    with torch.no_grad():
        return flow.velocity(LATENTS, SIGMA, PROMPTS, 3.5)


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# ---- numbers


def test_rows_are_rounded_to_a_sixteenth_of_each_number():
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 64)[:, None]
    codes, scale = to_fp8_rows(values)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == (64, 256) and scale.shape == (64, 1)
    held = codes.float() * scale
    smallest = scale * 2.0**-10  # half of the smallest step in e4m3
    assert ((held - values).abs() <= values.abs() / 16 + smallest).all()
    torch.testing.assert_close(held.abs().amax(1), values.abs().amax(1))
    assert relative(held, values) < 0.03


def test_rows_of_zeros_stay_and_what_is_not_finite_is_not_hidden():
    codes, scale = to_fp8_rows(torch.zeros(2, 16))
    assert not codes.float().any() and scale.isfinite().all()
    codes, scale = to_fp8_rows(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
    assert (codes.float() * scale).isnan().any(1).tolist() == [True, False]


def test_a_product_is_that_of_the_numbers_which_codes_stand_for():
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(rows, 64, generator=generator) for rows in (5, 32))
    parts = *to_fp8_rows(left), *to_fp8_rows(right)
    exact = (parts[0].double() * parts[1]) @ (parts[2].double() * parts[3]).t()
    ours = scaled_product(*parts)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scaled_product(*parts), ours)


def test_a_layer_is_a_linear_layer_to_a_few_per_cent():
    plain = nn.Linear(64, 32)
    layer = Fp8Linear(plain.bias, torch.float32)
    layer.codes, layer.scale = to_fp8_rows(plain.weight.detach())
    inputs = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))
    assert layer(inputs).shape == (2, 7, 32) and layer(inputs).dtype == torch.float32
    assert relative(layer(inputs), plain(inputs)) < 0.05


# ---- the copy


def test_a_tree_of_its_own_shares_every_tensor():
    flow = tiny_flow()
    flow.module.transformer_blocks[0].forward = lambda *_: None  # as if it were compiled
    twin = shared_copy(flow.module)
    ours, theirs = dict(twin.named_parameters()), dict(flow.module.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert not {id(part) for part in twin.modules()} & {id(part) for part in flow.module.modules()}
    assert "forward" not in vars(twin.transformer_blocks[0])
    twin.time_text_embed.register_forward_pre_hook(lambda *_: None)
    assert not flow.module.time_text_embed._forward_pre_hooks


def test_the_copy_has_the_hooks_of_diffusers_around_its_own_layers():
    class Doubles(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    layer = nn.Sequential(nn.Linear(2, 2))
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Doubles(), "doubles")
    twin, inputs = shared_copy(layer), torch.randn(3, 2)
    assert torch.equal(twin(inputs), layer(inputs))
    twin[0] = nn.Identity()
    assert torch.equal(twin(inputs), inputs * 2) and not torch.equal(layer(inputs), inputs * 2)


def test_the_copy_is_near_the_model_and_holds_nothing_afterwards():
    flow = tiny_flow()
    exact, before = velocity(flow), dict(flow.module.state_dict())
    copy = RolloutCopy(flow, torch.float32)
    with copy.filled() as twin:
        layers = [layer for layer in twin.module.modules() if isinstance(layer, Fp8Linear)]
        assert len(layers) == len(copy._layers) > 10
        assert 0 < relative(velocity(twin), exact) < 0.05
    assert all(layer.codes is None and layer.scale is None for layer in layers)
    assert torch.equal(velocity(flow), exact)
    assert flow.module.state_dict().keys() == before.keys()
    assert not any(isinstance(layer, Fp8Linear) for layer in flow.module.modules())
    assert twin.module.proj_out is not flow.module.proj_out and isinstance(twin.module.proj_out, nn.Linear)


def test_codes_are_those_of_the_weights_at_that_time():
    flow = tiny_flow()
    copy = RolloutCopy(flow, torch.float32)
    with copy.filled() as twin:
        first = velocity(twin)
    with torch.no_grad():
        for parameter in flow.module.parameters():
            parameter.mul_(1.1)
    with copy.filled() as twin:
        assert relative(velocity(twin), first) > 0.05
        assert relative(velocity(twin), velocity(flow)) < 0.05
        layer, source = copy._layers[0]
        codes, scale = to_fp8_rows(source.weight.detach())
        assert torch.equal(layer.codes.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(layer.scale, scale)


def test_memory_is_given_back_when_a_rollout_fails():
    copy = RolloutCopy(tiny_flow(), torch.float32)
    with pytest.raises(RuntimeError, match="stop"), copy.filled():
        raise RuntimeError("stop")
    assert all(layer.codes is None for layer, _ in copy._layers)


@pytest.mark.parametrize("frozen", ["full", "8bit", "fp8", "4bit"])
def test_a_lora_is_merged_into_the_codes(frozen):
    flow = tiny_flow()
    if frozen != "full":
        state = {name: tensor.clone() for name, tensor in flow.module.state_dict().items()}
        fill_compressed(flow.module, iter(state.items()), torch.float32, "cpu", {}, BLOCKS, frozen)
    names = add_lora(flow.module, LoraConfig(rank=4, alpha=2.0), flow.lora_targets["all"])
    without = velocity(flow)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in flow.module.named_parameters():
        if name in names:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    exact = velocity(flow)
    with RolloutCopy(flow, torch.float32).filled() as twin:
        assert not any("lora" in name for name, _ in twin.module.named_modules())
        assert relative(velocity(twin), exact) < 0.25 * relative(velocity(twin), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_that_are_in_fp8_anyway_are_used_as_they_are(dtype):
    flow = frozen_in_fp8()
    names = add_lora(flow.module, LoraConfig(rank=4, alpha=2.0), flow.lora_targets["all"])
    generator = torch.Generator().manual_seed(5)
    for name, parameter in flow.module.named_parameters():
        if name in names:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    exact, copy = velocity(flow), RolloutCopy(flow, dtype)
    with copy.filled() as twin:
        assert relative(velocity(twin), exact) < 0.03
        for layer, source in copy._layers:
            held = source.base_layer.parametrizations.weight
            assert layer.codes.data_ptr() == held.original.data_ptr() and layer.scale.shape == (len(layer.codes), 1)
            assert layer.down.dtype == layer.up.dtype == dtype
    assert all(getattr(layer, name) is None for layer, _ in copy._layers for name in PARTS)


def test_a_lora_beside_such_a_matrix_is_the_one_of_the_layer():
    flow = frozen_in_fp8()
    names = add_lora(flow.module, LoraConfig(rank=4, alpha=2.0), flow.lora_targets["all"])
    copy = RolloutCopy(flow, torch.float32)
    layer, source = copy._layers[0]
    inputs = torch.randn(3, 5, source.base_layer.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = source(inputs)
        for name, parameter in flow.module.named_parameters():
            if name in names:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
        with copy.filled():
            theirs, ours = source(inputs) - plain, layer(inputs)
            layer.down = None
            torch.testing.assert_close(ours - layer(inputs), theirs, rtol=1e-4, atol=1e-4)


def test_a_scale_for_all_rows_of_a_file_serves_too():
    linear = nn.Linear(32, 48)
    linear.weight.requires_grad_(False)
    numbers = linear.weight.detach().clone()
    linear.weight.data = (numbers / 0.01).to(torch.float8_e4m3fn)
    parametrize.register_parametrization(linear, "weight", Rows(torch.full((1, 1), 0.01), torch.float32), unsafe=True)
    codes, scale = fp8_codes(linear)
    assert scale.shape == (48, 1) and relative(codes.float() * scale, numbers) < 0.03
    assert fp8_codes(nn.Linear(32, 48)) is None


def frozen_in_fp8():
    flow = tiny_flow()
    state = {name: tensor.clone() for name, tensor in flow.module.state_dict().items()}
    fill_compressed(flow.module, iter(state.items()), torch.float32, "cpu", {}, BLOCKS, "fp8")
    return flow


def test_layers_that_do_not_suit_stay_as_they_are():
    assert takes_fp8(32, 48) and not takes_fp8(30, 48) and not takes_fp8(32, 40)
    flow = tiny_flow()
    block = flow.module.single_transformer_blocks[0]
    block.proj_mlp = odd = nn.Linear(32, 120)
    twin = RolloutCopy(flow, torch.float32).flow.module.single_transformer_blocks[0]
    assert twin.proj_mlp.weight is odd.weight and isinstance(twin.attn.to_q, Fp8Linear)
    flow.lora_targets = {"all": ("nothing",)}
    with pytest.raises(ConfigError, match=r"rollout\.precision='fp8': the model has no linear layers"):
        RolloutCopy(flow, torch.float32)


# ---- devices


def test_devices_without_products_in_fp8_are_refused(monkeypatch):
    check_fp8(torch.device("cpu"), "x")
    with pytest.raises(ConfigError, match="mps has no products in fp8"):
        check_fp8(torch.device("mps"), "rollout.precision='fp8'")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "An A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    wanted = r"rollout\.precision='fp8': An A100 \(compute capability 8\.0\) has no products in fp8.*set it to model"
    with pytest.raises(ConfigError, match=wanted):
        check_fp8(torch.device("cuda"), "rollout.precision='fp8'")


def test_a_run_is_told_before_models_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "An A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    config = tiny_config(tmp_path, rollout__precision="fp8")
    with pytest.raises(ConfigError, match="An A100"):
        check_fit(config, tiny_flow(), inputs_of(), torch.device("cuda"))


def inputs_of():
    from srpo_core.checks import Inputs

    return Inputs([], None)


# ---- runs


@pytest.mark.parametrize("settings", [{}, {"lora__rank": 4}, {"model__dtype": "bfloat16"}])
def test_a_step_rolls_out_the_copy_and_trains_the_model(tmp_path, settings):
    exact = assemble(tiny_config(tmp_path / "exact", **settings)).learner
    ours = assemble(tiny_config(tmp_path / "fp8", rollout__precision="fp8", **settings)).learner
    clean, wanted = ours._rollout(1, 0), exact._rollout(1, 0)
    assert torch.equal(clean.noise, wanted.noise)
    assert 0 < relative(clean.clean, wanted.clean) < 0.03
    before = [parameter.detach().clone() for parameter in ours.trained.values()]
    metrics, expected = (learner.step(1, Clock(lambda: None)) for learner in (ours, exact))
    assert metrics.loss == pytest.approx(expected.loss, rel=0.01)
    assert any((parameter != old).any() for parameter, old in zip(ours.trained.values(), before, strict=True))
    with ours._copy.filled() as twin:
        prompts, sigmas = wanted.prompts, shifted_sigmas(3, 3.0)
        assert not torch.equal(rollout(twin, prompts, wanted.noise, sigmas, 1.0).clean, clean.clean)  # it has learned
