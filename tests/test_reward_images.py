"""Pictures made ready for rewards: as PIL and torchvision do it, on tensors, with a right gradient."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from srpo_core.rewards.images import normalise, resize_crop, resize_pad, square

SIZES = [(720, 720), (768, 1344), (1344, 768), (224, 224), (224, 300), (300, 224), (97, 61), (500, 333), (640, 641)]
"""Heights and widths."""
FITS = ["crop", "pad"]
ROUNDING = 1.5 / 255
"""PIL rounds to 8 bits after each of its two passes: half a step each, the first weighted up to 1.3 times."""


def picture(height, width, smooth=True):
    """8-bit pixels [H, W, 3]: waves of many lengths, or noise of full contrast."""
    if not smooth:
        return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / (7 + 5 * c) + c) * np.cos(y / (11 - 2 * c)) + 0.3 * np.sin((x + y) / 3) for c in range(3)]
    return np.clip(np.stack(waves, -1) * 90 + 128, 0, 255).astype(np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255


def size_there(height, width, fit, size=224):
    """What sides the whole picture is resized to: torchvision rounds the long one down, the HPS scorer to nearest."""
    if fit == "crop":
        return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    scale = size / float(max(height, width))
    return round(height * scale), round(width * scale)


def placed(pixels, fit, size=224):
    """Centre square cut out, or black beside: [H, W, 3] numbers -> [1, 3, size, size]."""
    height, width = pixels.shape[:2]
    if fit == "crop":
        top, left = round((height - size) / 2.0), round((width - size) / 2.0)
        pixels = pixels[top : top + size, left : left + size]
    else:
        top, left = (size - height) // 2, (size - width) // 2
        pixels = np.pad(pixels, ((top, size - height - top), (left, size - width - left), (0, 0)))
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255


def by_pil(pixels, fit, size=224):
    """The scorers' steps on 8-bit pictures."""
    height, width = size_there(*pixels.shape[:2], fit, size)
    return placed(np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)), fit, size)


def by_pil_in_float(pixels, fit):
    """The same filter of PIL on floating-point channels: nothing is rounded or clamped."""
    height, width = size_there(*pixels.shape[:2], fit)
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.array(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return placed(np.stack(resized, -1), fit)


def by_torchvision(pixels, fit):
    """The HPS authors' and OpenAI's steps on tensors."""
    images = tensor(pixels)
    if fit == "crop":
        return tv.center_crop(tv.resize(images, 224, InterpolationMode.BICUBIC, antialias=True), 224)
    height, width = size_there(*pixels.shape[:2], fit)
    images = tv.resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
    down, across = 224 - height, 224 - width
    return tv.pad(images, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_those_of_the_official_pipelines(size, fit):
    for smooth in (True, False):
        pixels = picture(*size, smooth)
        ours = square(tensor(pixels), 224, fit)
        assert ours.shape == (1, 3, 224, 224)
        assert (ours - by_torchvision(pixels, fit)).abs().max() < 1e-6
        assert (ours - by_pil_in_float(pixels, fit)).abs().max() < 5e-5
        rounded = (ours.clamp(0, 1) - by_pil(pixels, fit)).abs()
        if smooth:
            assert rounded.max() < ROUNDING
        else:  # it also clamps after the first pass: single pixels of noise differ by a tenth
            assert rounded.mean() < 0.5 / 255


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(9, 15), (15, 9), (5, 5), (6, 6), (4, 20)], ids=str)
def test_gradients_are_those_of_finite_differences(shape, fit):
    images = torch.rand(1, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise(square(x, 6, fit), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), images)


def test_a_picture_of_the_right_size_stays_as_it_is():
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(resize_crop(images, 32), images) and torch.equal(resize_pad(images, 32), images)


def test_crop_keeps_the_middle_and_pad_keeps_everything():
    images = torch.zeros(1, 3, 100, 300)
    images[..., :20], images[..., 140:160] = 1.0, 1.0
    cropped, padded = resize_crop(images, 60), resize_pad(images, 60)
    assert cropped[..., 30, 30].min() > 0.9 and cropped[..., :10].abs().max() < 0.1
    assert padded[..., 30, 0].min() > 0.9 and padded[..., 30, 30].min() > 0.9
    assert torch.count_nonzero(padded[..., :20, :]) == 0 and torch.count_nonzero(padded[..., 40:, :]) == 0


@pytest.mark.parametrize("shape", [(1000, 3), (3, 1000), (1, 1)], ids=str)
def test_extreme_shapes_become_squares(shape):
    for fit in FITS:
        assert square(torch.rand(1, 3, *shape), 16, fit).shape == (1, 3, 16, 16)
