"""Graphs in the API's form, and what their nodes show."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from srpo_core.preview import to_pil


def node(kind, **inputs):
    """A node of a graph; an input is a value, or a link [id, number of the output]."""
    return {"class_type": kind, "inputs": inputs}


REWARD = node("SRPOLoadReward", reward="miniature", file="auto", fit="official", device="auto", offload="when needed")


def texts(result, name):
    """What a PreviewAny shows: a text for each value of a list."""
    return result.outputs[name]["text"]


def shown(server, result, name):
    """The pictures under a node, [H, W, 3] in [0, 255] each."""
    files = [server.view(picture) for picture in result.outputs[name]["images"]]
    return [np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int) for data in files]


def assert_alike(pictures, expected):
    """Pictures of a server and of the engine, [3, H, W]; ComfyUI rounds down where the engine rounds."""
    assert len(pictures) == len(expected)
    for picture, image in zip(pictures, expected, strict=True):
        assert np.abs(picture - np.array(to_pil(image)).astype(int)).max() <= 1


def assert_same_numbers(found, columns, rows):
    """A table under a node and the engine's: decibels come with two decimals, all else with four or more."""
    assert found["columns"] == columns and len(found["rows"]) == len(rows)
    for row, wanted in zip(found["rows"], rows, strict=True):
        for column, value, right in zip(columns, row, wanted, strict=True):
            assert abs(value - right) < (0.011 if column.endswith(" dB") else 5e-4), (column, value, right)
