"""Which activations are kept: those that fit, with the same numbers either way."""

from __future__ import annotations

import pytest
import torch
from tiny import encode_text, tiny_config, tiny_flow, weights_hash
from torch import nn

from srpo_core.assemble import assemble
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.description import load_run
from srpo_core.keeping import Keeping, keep_what_fits, pieces_of

MIB = 2**20


class Scripted:
    """A device whose memory a test tells: `kept` bytes go when a block's activations are let go."""

    def __init__(self, free: int) -> None:
        self.free, self.used, self.most = free, 0, 0

    def take(self, count: int) -> None:
        self.used += count
        self.most = max(self.most, self.used)

    def allocated(self) -> int:
        return self.used

    def peak(self) -> int:
        return self.most

    def room(self) -> int:
        return self.free - self.used


class Block(nn.Module):
    """Takes `out` bytes for its output, and `inner` more as long as its activations are kept."""

    def __init__(self, memory: Scripted, calls: list[str], name: str, out: int, inner: int) -> None:
        super().__init__()
        self.memory, self.calls, self.name, self.out, self.inner = memory, calls, name, out, inner
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.name)
        recomputed = self.calls.count(self.name) > 1
        self.memory.take(self.out + self.inner if recomputed else self.out)
        return torch.sin(hidden * self.weight)


class BreaksOff(nn.Module):
    """Can't be gone back through."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = hidden * 1
        out.register_hook(self.refuse)
        return out

    def refuse(self, gradient: torch.Tensor) -> None:
        raise RuntimeError("no code for it")


def passes(keeping: Keeping, memory: Scripted, blocks: list[Block], pieces: list[Block], size: int, calls: list[str]):
    """A forward and a backward pass; which blocks' forward ran again, and the gradient."""
    calls.clear()
    memory.used = memory.most = 0
    hidden = torch.linspace(0, 1, size, requires_grad=True)
    out = hidden
    for block in blocks:
        out = keeping.block(block, out)
    for piece in pieces:
        out = keeping.decoder_block(piece, out)
    memory.take(50 * MIB)  # the reward
    memory.used -= 50 * MIB
    out.sum().backward()
    return [name for name in dict.fromkeys(calls) if calls.count(name) > 1], hidden.grad


def world(free: int, aside: int = 0):
    calls: list[str] = []
    memory = Scripted(free)
    blocks = [Block(memory, calls, f"b{i}", 10 * MIB, 100 * MIB) for i in range(6)]
    pieces = [Block(memory, calls, f"d{i}", 5 * MIB, 30 * MIB) for i in range(2)]
    return Keeping(memory, blocks, aside=lambda: aside), memory, blocks, pieces, calls


def test_the_first_pass_recomputes_everything_and_later_ones_what_does_not_fit():
    keeping, *rest = world(free=600 * MIB)
    everything = {f"b{i}" for i in range(6)} | {"d0", "d1"}
    recomputed, first = passes(keeping, *rest[:3], 8, rest[3])
    assert set(recomputed) == everything
    recomputed, second = passes(keeping, *rest[:3], 8, rest[3])
    assert recomputed == ["b0", "b1"]  # the last ones are kept, and the decoder, which takes least
    assert torch.equal(first, second)


@pytest.mark.parametrize(("free", "kept"), [(100, 0), (300, 1), (400, 2), (10_000, 6)])
def test_more_room_keeps_more(free, kept):
    keeping, *rest = world(free * MIB)
    passes(keeping, *rest[:3], 8, rest[3])
    passes(keeping, *rest[:3], 8, rest[3])
    assert 6 - keeping.first_kept == kept and keeping.decoder_kept == (free > 100)


def test_what_other_streams_will_take_is_no_room():
    """Gradients of a model in parts are made on a stream of their own, which can't use what activations leave."""
    for free, aside, kept in ((400, 0, 2), (500, 100, 2), (400, 100, 1)):
        keeping, *rest = world(free * MIB, aside * MIB)
        passes(keeping, *rest[:3], 8, rest[3])
        passes(keeping, *rest[:3], 8, rest[3])
        assert 6 - keeping.first_kept == kept


def test_a_backward_pass_that_broke_off_has_taught_nothing():
    """A step that is tried again without a compiler recomputes everything once more, as nothing it learned is true."""
    keeping, memory, blocks, pieces, calls = world(400 * MIB)
    keeping.begin(compiled=True)
    with pytest.raises(RuntimeError, match="no code"):
        passes(keeping, memory, [*blocks[:-1], BreaksOff(), blocks[-1]], pieces, 8, calls)
    keeping.begin(compiled=False)
    recomputed, _ = passes(keeping, memory, blocks, pieces, 8, calls)
    assert set(recomputed) == {f"b{i}" for i in range(6)} | {"d0", "d1"}
    keeping.begin(compiled=False)
    passes(keeping, memory, blocks, pieces, 8, calls)
    assert 6 - keeping.first_kept == 2


def test_larger_pictures_keep_less():
    """By their tokens: activations grow with them; what was learned on a larger one is not scaled down."""
    kept = {}
    for size in (8, 16, 4):
        keeping, *rest = world(600 * MIB)
        passes(keeping, *rest[:3], 8, rest[3])
        passes(keeping, *rest[:3], size, rest[3])
        kept[size] = 6 - keeping.first_kept
    assert kept[16] < kept[8] == kept[4] == 4


def test_a_model_gives_the_same_numbers_whatever_is_kept():
    """FLUX's blocks and a decoder's, all recomputed, a part kept, all kept: bit for bit the same gradients."""
    from test_flux import tiny_vae

    from srpo_core.models.flux import ImageAutoencoder

    def gradients(first_kept: int | None, decoder_kept: bool):
        flow, autoencoder = tiny_flow(), ImageAutoencoder(tiny_vae(), recompute="auto")
        flow.module.enable_gradient_checkpointing()
        keeping = keep_what_fits(flow.module, flow.block_types, autoencoder.module, Scripted(0))
        keeping._decide = lambda: None
        keeping.first_kept = 2 if first_kept is None else first_kept
        keeping.decoder_kept = decoder_kept
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        velocity = flow.velocity(latents, torch.full((2,), 0.7), encode_text(["a cat", "a dog"]), 3.5)
        images = autoencoder.decode(velocity)
        images.square().mean().backward()
        return [p.grad for p in flow.module.parameters()]

    every = gradients(None, False)
    assert len([g for g in every if g is not None]) > 30
    for other in (gradients(1, False), gradients(0, True)):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(every, other, strict=True))


def test_a_decoder_is_recomputed_in_its_resnets():
    from test_flux import tiny_vae

    decoder = tiny_vae().decoder
    chain = pieces_of(decoder.up_blocks[0], (None,))
    hidden = torch.randn(1, decoder.up_blocks[0].resnets[0].in_channels, 4, 4)
    whole = decoder.up_blocks[0](hidden, None)
    for piece, more in chain:
        hidden = piece(hidden, *more)
    assert torch.equal(hidden, whole) and len(chain) >= 2
    assert pieces_of(decoder.mid_block, (None,)) is None


def test_without_a_gpu_auto_recomputes_everything(tmp_path):
    hashes = set()
    for recompute in ("auto", True, False):
        trainer = assemble(tiny_config(tmp_path / str(recompute), optim__steps=2, model__recompute=recompute))
        trainer.train()
        hashes.add(weights_hash(trainer.flow.module))
    assert len(hashes) == 1


def test_the_setting_is_true_false_or_auto():
    for text, value in (("auto", "auto"), ("true", True), ("false", False)):
        assert load_run("flux-dev-lora", [f"model.recompute={text}"]).model.recompute == value
    with pytest.raises(ConfigError, match=r"model\.recompute"):
        load_run("flux-dev-lora", ["model.recompute=sometimes"])
    assert ModelConfig().recompute is True
