"""Attention kernels: what is chosen, what is never tried with gradient, and that a flow's calls use what was chosen."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny import encode_text, tiny_config, tiny_flow
from toy import ExactFlow, toy_batch

from srpo_core import attention
from srpo_core.attention import Attention, _query_of, choose_attention, fastest, kernel, trial
from srpo_core.checks import Inputs, check_fit
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.models import load_model

PROMPTS = encode_text(["a red cat", "a blue dog"])
LATENTS = torch.zeros(2, 4, 8, 8)
QUERY = torch.zeros(2, 3, 40, 16)


def enabled():
    """PyTorch's kernels that calls may use now."""
    flags = torch.backends.cuda
    named = {"flash": flags.flash_sdp_enabled, "cudnn": flags.cudnn_sdp_enabled, "math": flags.math_sdp_enabled,
             "efficient": flags.mem_efficient_sdp_enabled}  # fmt: skip
    return {name for name, is_on in named.items() if is_on()}


# ---- the choice


def test_the_usual_kernel_stays_unless_another_is_clearly_faster():
    assert fastest({"flash": 1.0, "cudnn": 0.99}) == "flash"
    assert fastest({"flash": 1.0, "cudnn": 0.6, "efficient": 0.8}) == "cudnn"
    assert fastest({"efficient": 2.0}) == "efficient"
    assert fastest({}) == "native"


def test_every_name_of_the_setting_is_known_and_cudnn_is_never_tried_with_gradient():
    names = set(ModelConfig.model_fields["attention"].annotation.__args__) - {"auto", "native"}
    assert names == {*attention.NATIVE, *attention.PACKAGES}
    assert names >= set(attention.WITHOUT_GRADIENT) > set(attention.WITH_GRADIENT)
    assert "cudnn" not in attention.WITH_GRADIENT


def test_elsewhere_than_on_a_gpu_there_is_nothing_to_choose():
    for wanted in ("auto", "native", "cudnn", "flash"):
        assert choose_attention(wanted, ExactFlow(), *toy_batch(1), 1.0) == (Attention(), "")


def test_a_package_that_is_not_there_is_named_with_what_is():
    wanted = r"model\.attention='flash-attn-3': the package flash_attn_interface isn't there; auto, native, flash"
    with pytest.raises(ConfigError, match=wanted):
        choose_attention("flash-attn-3", ExactFlow(), *toy_batch(1), 1.0)


def test_a_family_with_kernels_of_its_own_has_no_choice(tmp_path):
    for wanted in ("auto", "native", "flash"):
        config = tiny_config(tmp_path, model={"family": "toy_run:load", "attention": wanted})
        refused = pytest.raises(ConfigError, match=r"model\.attention='flash'.*toy_run.*\(choices: auto, native\)")
        with refused if wanted == "flash" else contextlib.nullcontext():
            check_fit(config, load_model(config.model, "cpu").outline(), Inputs([], None), torch.device("cpu"))


def test_the_fastest_is_taken_with_and_without_gradient(monkeypatch):
    times = {("flash", False): 2e-3, ("cudnn", False): 1e-3, ("flash", True): 5e-3, ("efficient", True): 4e-3}
    asked = []

    def known(name, query, gradient):
        asked.append((name, gradient))
        return times.get((name, gradient))

    monkeypatch.setattr(attention, "trial", known)
    chosen, told = attention._measured(QUERY, attention.NATIVE)
    assert chosen == Attention("cudnn", "efficient")
    assert ("cudnn", True) not in asked
    assert "2 x 3 x 40 x 16" in told and "cudnn 1.00 ms" in told and "flash 5.00 ms" in told


def test_a_package_that_sees_its_own_tokens_alone_is_not_tried_where_they_are_shared(monkeypatch):
    """Further packages attend to a process's own tokens: with parallel.context above 1 only PyTorch's are tried."""
    tried = []

    def measured(query, suitable):
        tried.append(set(suitable))
        return Attention(), ""

    monkeypatch.setattr(attention, "_query_of", lambda *_: (QUERY.bfloat16(), False))
    monkeypatch.setattr(attention, "_measured", measured)
    prompts, _ = toy_batch(1)
    on_gpu = SimpleNamespace(is_cuda=True)
    for packages in (True, False):
        choose_attention("auto", ExactFlow(), prompts, on_gpu, 1.0, packages)
    assert tried == [{*attention.NATIVE, *attention.PACKAGES}, set(attention.NATIVE)]


# ---- the self-check


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("wrong", "is_right"),
    [(None, True), (lambda x: x * 1.1, False), (lambda x: x * torch.nan, False), (lambda x: x + 1e-4, True)],
)
def test_a_kernel_has_to_agree_with_float32(monkeypatch, gradient, wrong, is_right):
    results = attention._results

    def changed(name, *more):
        found = results(name, *more)
        return [*found[:-1], wrong(found[-1])] if wrong is not None and name != "exact" else found

    def reference(name, *more):
        return results(name, *more) if name == "math" else changed(name, *more)

    monkeypatch.setattr(attention, "_results", reference)
    monkeypatch.setattr(attention, "_seconds", lambda *_: 0.5)
    assert trial("flash", QUERY.bfloat16(), gradient) == (0.5 if is_right else None)


def test_a_kernel_that_cannot_is_left_out(monkeypatch):
    def broken(*_):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention, "_results", broken)
    assert trial("flash", QUERY, False) is None


def test_the_query_that_is_measured_is_the_flows_own():
    for dtype in (torch.float32, torch.bfloat16):
        flow = tiny_flow(dtype)
        flow.module.to(dtype)
        query, is_wide = _query_of(flow, PROMPTS, LATENTS, 3.5)
        assert query.shape == (2, 2, 16 + 5, 16) and query.dtype == dtype  # heads, tokens and text tokens
        assert is_wide == (dtype == torch.float32)
    assert _query_of(ExactFlow(), *toy_batch(2), 1.0) == (None, False)


# ---- its use


def test_contexts_name_kernels_and_leave_things_as_they_were():
    before = enabled()
    assert "cudnn" in before
    with Attention().with_gradient():
        assert enabled() == before - {"cudnn"}
    with Attention("cudnn", "efficient").without_gradient():
        assert enabled() == before
    with Attention("cudnn", "efficient").with_gradient():
        assert enabled() == {"efficient", "flash", "math"}
    with kernel("math"):
        assert "math" in enabled()
    assert enabled() == before


def test_a_flow_uses_the_kernel_of_its_kind_of_call():
    flow, used = tiny_flow(), []

    class Spy(Attention):
        def without_gradient(self):
            used.append("without")
            return contextlib.nullcontext()

        def with_gradient(self):
            used.append("with")
            return contextlib.nullcontext()

    flow.attention = Spy()
    flow.velocity(LATENTS, torch.full((2,), 0.9), PROMPTS, 3.5)
    with torch.no_grad():
        flow.velocity(LATENTS, torch.full((2,), 0.9), PROMPTS, 3.5)
    assert used == ["with", "without"]
