"""Modules made without the bytes of their parameters."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from coldstart.frameworks import meta

ORIGINALS = (nn.Module.register_parameter, nn.Module._apply)


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


def test_modules_may_be_converted_inside_a_block():
    """to(), half() and their like convert dtypes and move buffers; parameters stay without bytes."""
    with meta():
        made = nn.Sequential(nn.LSTM(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2)))
        made.to("cpu", torch.float64)
        made[1].half()
        made[2].to(memory_format=torch.channels_last).to("cpu")
    assert all(parameter.is_meta for parameter in made.parameters())
    assert made[0].weight_hh_l0.dtype == made[2][0].weight.dtype == torch.float64
    assert made[1].weight.dtype == made[1].running_mean.dtype == torch.float16
    assert not made[1].running_mean.is_meta


def test_outside_torch_says_that_there_are_no_bytes():
    """A skeleton that is moved before it is bound is an error of torch's, as without coldstart."""
    with meta():
        made = nn.Linear(1, 1)
    with pytest.raises(NotImplementedError, match="no data"):
        made.to("cpu")


def test_blocks_nest_and_end():
    """The inner block's end does not end the outer one, and after the last all is as it was."""
    with meta():
        with meta():
            pass
        assert nn.Linear(1, 1).weight.is_meta
    assert (nn.Module.register_parameter, nn.Module._apply) == ORIGINALS
    assert not nn.Linear(1, 1).weight.is_meta


def test_an_error_inside_ends_the_block():
    """A build() that fails leaves torch as it found it."""
    with pytest.raises(RuntimeError, match="build"), meta():
        raise RuntimeError("build")
    assert (nn.Module.register_parameter, nn.Module._apply) == ORIGINALS


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
    assert (nn.Module.register_parameter, nn.Module._apply) == ORIGINALS


def test_filling_parameters_without_bytes_does_not_import_the_compiler() -> None:
    """A restored start must not pay for torch's compiler, which torch imports for the first normal_ on a meta tensor."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from coldstart.frameworks import meta\n"
        "with meta(): made = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))\n"
        "assert all(parameter.is_meta for parameter in made.parameters())\n"
        "print([name for name in set(sys.modules) - before if 'dynamo' in name or 'sympy' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
