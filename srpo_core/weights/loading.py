"""Filling modules with weights tensor by tensor: host memory holds the target and one tensor more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .tensors import TensorFile, WeightsError

Stream = Iterator[tuple[str, Tensor]]
Module = TypeVar("Module", bound=nn.Module)
SHOWN = 3
"""Names that a message lists."""


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device; buffers, such as tables, are real."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def check(
    module: nn.Module,
    outline: Iterable[tuple[str, Tensor]],
    what: TensorFile | str,
    own_name: Callable[[str], str] = str,
) -> None:
    """WeightsError unless the tensors of `outline` (on meta) have exactly the module's names and shapes.

    `own_name` gives a tensor's name in the file, for the message.
    """
    _take(_slots(module), outline, lambda places, tensor: None, what, own_name)


def fill(
    module: Module, stream: Stream, dtype: torch.dtype | None, device: torch.device | str, what: TensorFile | str
) -> Module:
    """Give a module (built within `empty_parameters`) its weights, in `dtype` (None: as they come) on `device`.

    A parameter that has several names (tied weights) needs one of them. WeightsError, in the words of the file or text
    `what`, for missing, unexpected or wrongly shaped tensors; the module is of no use then.
    """

    def put(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
        tensor = _own(tensor.to(device).to(dtype or tensor.dtype))
        owner, attribute = places[0]
        if attribute in owner._parameters:
            tensor = nn.Parameter(tensor, owner._parameters[attribute].requires_grad)
        for owner, attribute in places:
            setattr(owner, attribute, tensor)

    _take(_slots(module), stream, put, what)
    for owner in module.modules():
        for attribute, buffer in owner._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                owner._buffers[attribute] = buffer.to(device)
    return module


def _own(tensor: Tensor) -> Tensor:
    """The tensor in storage of its own: a part of a stacked tensor would keep all of it in memory."""
    tensor = tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


Slots = dict[str, list[tuple[nn.Module, str]]]
"""Places (module, attribute) of a tensor by its name; tied names share one list."""


def _slots(module: nn.Module) -> Slots:
    by_tensor: dict[int, list[tuple[nn.Module, str]]] = {}
    slots: Slots = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or attribute in owner._non_persistent_buffers_set:
                continue
            places = by_tensor.setdefault(id(tensor), [])
            places.append((owner, attribute))
            slots[f"{prefix}.{attribute}" if prefix else attribute] = places
    return slots


def _take(
    slots: Slots,
    stream: Iterable[tuple[str, Tensor]],
    put: Callable[[list[tuple[nn.Module, str]], Tensor], None],
    what: TensorFile | str,
    own_name: Callable[[str], str] = str,
) -> None:
    """Hand each tensor to its places. WeightsError with the first few names that don't fit, and shapes that differ."""
    shapes = {name: tuple(getattr(*places[0]).shape) for name, places in slots.items()}
    done: set[int] = set()
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for name, tensor in stream:
        if name not in slots:
            unexpected.append(name)
        elif tuple(tensor.shape) != shapes[name]:
            wrong[name] = f"{own_name(name)} is {tuple(tensor.shape)}, not {shapes[name]}"
        else:
            done.add(id(slots[name]))
            if not unexpected and not wrong:
                put(slots[name], tensor)
    missing = [own_name(n) for n, places in slots.items() if id(places) not in done and n not in wrong]
    missing = list(dict.fromkeys(missing))
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for kind, names in (
            ("missing", missing),
            ("of another shape", list(wrong.values())),
            ("unexpected", unexpected),
        )
        if names
    ]
    if problems:
        reason = f"its tensors don't fit the model: {'; '.join(problems)}"
        way_out = "the file is incomplete or of another model"
        raise what.error(reason, way_out) if isinstance(what, TensorFile) else WeightsError("", what, reason, way_out)
