"""A reward of many pictures in batches: the values of one call, whatever the size and whatever the memory allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_core.rewards.batches import in_batches


class Pairs:
    """Value of picture i with prompt p: 1000 times the number in the prompt plus the picture's; remembers its calls."""

    def __init__(self, room=1 << 20):
        self.room, self.calls = room, []

    def __call__(self, images, prompts):
        self.calls.append(len(images))
        if len(images) > self.room:
            raise MemoryError("out of memory")
        numbers = torch.tensor([float(prompt) for prompt in prompts])
        return 1000 * numbers + images[:, 0, 0, 0].repeat(len(prompts) // len(images))


def pictures(count):
    return torch.arange(float(count)).view(count, 1, 1, 1).expand(count, 3, 2, 2)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 10))
def test_the_values_are_those_of_one_call(count, wordings, size):
    prompts = [str(number) for number in range(count * wordings)]
    read = []
    values = in_batches(Pairs(), pictures(count), prompts, size, "cpu", read.append)
    assert torch.equal(values, Pairs()(pictures(count), prompts))
    assert sum(read) == count and max(read) <= size


def test_fewer_pictures_are_read_where_memory_is_short():
    reward, read = Pairs(room=2), []
    prompts = [str(number) for number in range(14)]
    values = in_batches(reward, pictures(7), prompts, 6, "cpu", read.append)
    assert torch.equal(values, Pairs()(pictures(7), prompts))
    assert reward.calls == [6, 3, 2, 2, 2, 1] and read == [2, 2, 2, 1]


def test_one_picture_too_many_and_other_errors_are_told():
    with pytest.raises(MemoryError):
        in_batches(Pairs(room=0), pictures(3), ["1", "2", "3"], 8, "cpu")
    with pytest.raises(ValueError, match="could not convert"):
        in_batches(Pairs(), pictures(1), ["x"], 8, "cpu")


@pytest.mark.parametrize(("count", "prompts"), [(2, ["1"]), (2, ["1", "2", "3"]), (0, ["1"])])
def test_prompts_must_divide_among_the_images(count, prompts):
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts don't divide among {count} images"):
        in_batches(Pairs(), pictures(count), prompts, 8, "cpu")
