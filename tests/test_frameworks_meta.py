"""Modules made without the bytes of their parameters."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from coldstart.frameworks import meta

REGISTER = nn.Module.register_parameter


def test_parameters_have_no_bytes_and_buffers_are_real():
    """Only parameters move: running statistics and tables are made by build() and stay."""
    with meta():
        made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert all(parameter.is_meta for parameter in made.parameters())
    assert not any(buffer.is_meta for buffer in made.buffers())
    assert type(made[0].weight) is nn.Parameter


def test_initialising_costs_nothing():
    """A layer of a hundred gigabytes is made in no memory."""
    with meta():
        made = nn.Linear(1 << 17, 1 << 17, bias=False, device="meta")
        nn.init.normal_(made.weight)
    assert made.weight.numel() == 1 << 34


def test_tied_parameters_stay_tied():
    """One parameter registered at two places, before or after it moved, is one parameter."""
    real = nn.Parameter(torch.zeros(2))
    with meta():
        first, second, third = nn.Module(), nn.Module(), nn.Module()
        first.weight = real
        second.weight = real
        third.weight = first.weight
    assert first.weight is second.weight is third.weight
    assert first.weight.is_meta


def test_flags_and_attributes_move_along():
    """requires_grad and what Python code attached are the parameter's, with bytes or without."""
    real = nn.Parameter(torch.zeros(2), requires_grad=False)
    real.loader = "mine"
    with meta():
        made = nn.Module()
        made.weight = real
        made.bias = None
        made.register_parameter("none", None)
    assert (made.weight.requires_grad, made.weight.loader, made.none) == (False, "mine", None)


def test_tensor_subclasses_move_and_other_parameters_stay():
    """What can be taken apart has a meta form; of any other subclass nobody knows one."""

    class Special(nn.Parameter):
        pass

    with meta():
        made = nn.Module()
        made.two = nn.Parameter(TwoTensor(torch.zeros(1), torch.zeros(1)))
        made.special = Special(torch.zeros(1))
        made.lazy = nn.UninitializedParameter()
    assert made.two.is_meta
    assert type(made.two) is TwoTensor
    assert not made.special.is_meta
    assert isinstance(made.lazy, nn.UninitializedParameter)


def test_blocks_nest_and_end():
    """The inner block's end does not end the outer one, and after the last all is as it was."""
    with meta():
        with meta():
            pass
        assert nn.Linear(1, 1).weight.is_meta
    assert nn.Module.register_parameter is REGISTER
    assert not nn.Linear(1, 1).weight.is_meta


def test_an_error_inside_ends_the_block():
    """A build() that fails leaves torch as it found it."""
    with pytest.raises(RuntimeError, match="build"), meta():
        raise RuntimeError("build")
    assert nn.Module.register_parameter is REGISTER


def test_other_threads_get_real_parameters():
    """While one thread builds without bytes, another makes ordinary modules; blocks of two threads may overlap."""
    inside, leave = threading.Event(), threading.Event()
    made: list[nn.Module] = []

    def build() -> None:
        with meta():
            inside.set()
            assert leave.wait(30)
            made.append(nn.Linear(1, 1))

    thread = threading.Thread(target=build)
    thread.start()
    assert inside.wait(30)
    assert not nn.Linear(1, 1).weight.is_meta
    with meta():
        pass
    leave.set()
    thread.join()
    assert made[0].weight.is_meta
    assert nn.Module.register_parameter is REGISTER
