"""The score heads of ImageReward and of the LAION aesthetic predictor v2: five linear layers, nothing between them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

PLACES = (0, 2, 4, 6, 7)
"""Places of the linear layers in the published `layers`; between them stood dropout, for training."""


def below(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes whose names start with `prefix`, which is cut off."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


class ScoreHead(nn.Module):
    """Features [N, width] to scores [N], under the published names.

    Sizes are read off `shapes`: KeyError names a layer that they lack, ValueError says that they lead to no score.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        sizes = {place: shapes[f"layers.{place}.weight"] for place in PLACES}
        whole = all(len(size) == 2 for size in sizes.values())
        if not whole or [size[0] for size in sizes.values()] != [*[size[1] for size in sizes.values()][1:], 1]:
            raise ValueError(f"layers of shapes {', '.join(map(str, sizes.values()))} don't lead to one score")
        self.width = sizes[0][1]
        self.layers = nn.ModuleDict({str(place): nn.Linear(size[1], size[0]) for place, size in sizes.items()})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)
