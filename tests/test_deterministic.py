"""parallel.deterministic: what it asks of PyTorch, what it leaves behind, and what stands in for what has no order."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import ColourReward, tiny_config, weights_hash
from torch.utils._python_dispatch import TorchDispatchMode

from srpo_core import speed
from srpo_core.assemble import assemble
from srpo_core.description import load_run
from srpo_core.deterministic import deterministic
from srpo_core.errors import TrainingError
from srpo_core.miniature import looks
from srpo_core.rewards.images import square

WITHOUT_ORDER = (
    *("median.dim", "nanmedian.dim", "kthvalue", "cumsum", "histc", "put", "scatter_reduce", "_ctc_loss_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad1d_backward"),
    *("replication_pad2d_backward", "replication_pad3d_backward", "reflection_pad3d_backward", "nll_loss2d_forward"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "max_unpool2d", "max_unpool3d", "avg_pool3d_backward"),
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("max_pool3d_with_indices_backward", "fractional_max_pool2d_backward", "_embedding_bag_dense_backward"),
)
"""Operations that PyTorch has no deterministic kernel for on GPUs (docs of torch.use_deterministic_algorithms)."""


class Orderless(TorchDispatchMode):
    """Notes which operations without an order are called with numbers that are not whole."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name, _, overload = str(func).removeprefix("aten.").partition(".")
        numbers = any(isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args)
        if numbers and {name, name.removesuffix("_"), f"{name}.{overload}"} & set(WITHOUT_ORDER):
            self.found.add(f"{name}.{overload}")
        return func(*args, **(kwargs or {}))


def state():
    """What PyTorch is asked for now."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Whatever the process had set comes back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_settings_come_back_after_it_and_after_an_error(before):
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        there = state()
        with pytest.raises(ValueError, match="of the run"), deterministic(True):
            assert state() == (True, False, False)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise ValueError("of the run")
        assert state() == there
        with deterministic(False):
            assert state() == there
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_compiler_measures_nothing_that_changes_numbers():
    import torch._inductor.config as settings

    if not hasattr(settings, "deterministic"):
        pytest.skip("this PyTorch's compiler has no such setting")
    before = settings.deterministic
    with deterministic(True):
        assert settings.deterministic
    assert settings.deterministic == before


def test_what_has_no_such_kernel_is_an_error_that_names_the_setting():
    wanted = r"parallel\.deterministic=true: put_.*Set parallel\.deterministic=false"
    with pytest.raises(TrainingError, match=wanted), deterministic(True):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_other_errors_of_a_run_stay_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes don't fit$"), deterministic(True):
        raise RuntimeError("shapes don't fit")


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(720, 720), (300, 224), (97, 61), (240, 426)])
def test_pictures_are_resized_alike(fit, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    usual = square(images, 224, fit)
    (gradient,) = torch.autograd.grad((usual * weights).sum(), images)
    with deterministic(True):
        ours = square(images, 224, fit)
        (again,) = torch.autograd.grad((ours * weights).sum(), images)
    torch.testing.assert_close(ours, usual, atol=2e-6, rtol=0)
    torch.testing.assert_close(again, gradient, atol=1e-5, rtol=0)


def test_a_run_trains_in_it_and_to_the_same_weights_on_the_cpu(tmp_path, monkeypatch):
    seen, hashes = [], []
    score = ColourReward.__call__

    def watched(self, images, prompts):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return score(self, images, prompts)

    for wanted in (False, True):
        trainer = assemble(tiny_config(tmp_path / str(wanted), parallel__deterministic=wanted))
        monkeypatch.setattr(ColourReward, "__call__", watched)
        trainer.train()
        monkeypatch.setattr(ColourReward, "__call__", score)
        assert set(seen) == {wanted}
        seen.clear()
        hashes.append(weights_hash(trainer.flow.module))
    assert hashes[0] == hashes[1] and not torch.are_deterministic_algorithms_enabled()


def test_a_whole_run_of_the_miniature_calls_nothing_that_gpus_have_no_order_for(tmp_path):
    changes = ["optim.steps=1", "output.evaluate_prompts=2", "output.preview_every=0", "optim.accumulation=1"]
    changes += [f"output.dir={tmp_path / 'run'}", "parallel.deterministic=true"]
    trainer = assemble(load_run("miniature", changes))
    with Orderless() as orderless:
        trainer.train()
    assert orderless.calls > 10_000 and not orderless.found


def test_the_operations_that_it_looks_for_are_called_by_these_names():
    images = torch.rand(1, 3, 40, 40, requires_grad=True)
    with Orderless() as orderless:
        square(images, 24, "crop").sum().backward()
        images.detach().flatten(1).median(1)
        images.detach().cumsum_(0)
    assert orderless.found == {"_upsample_bicubic2d_aa_backward.default", "median.dim", "cumsum_.default"}


def test_the_looks_median_is_pytorch_s():
    for side in (8, 15):
        images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(side))
        assert torch.equal(looks._median(images), images.flatten(1).median(1).values)


def test_attention_is_not_chosen_by_time(tmp_path, monkeypatch):
    asked = []
    choose = speed.choose_attention
    monkeypatch.setattr("srpo_core.speed.choose_attention", lambda *args: asked.append(args[0]) or choose(*args))
    for attention in ("auto", "native", "efficient"):
        for wanted in (False, True):
            config = tiny_config(tmp_path / "run", parallel__deterministic=wanted)
            config.model.attention = attention
            assemble(config)
    assert asked == ["auto", "flash", "native", "native", "efficient", "efficient"]
