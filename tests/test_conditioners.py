"""Networks for couplings: their start, their parts, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from flowcourse.conditioners import (
    ResidualBlock,
    convnet,
    convolution,
    residual,
)
from flowcourse.elementwise import mlp


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (residual(3, 4, (8, 16)), (5, 3)),
        (residual(3, 4, (8,), dropout=0.5), (5, 3)),
        (residual(3, 4, (8, 8), layer=convolution), (5, 3, 4, 6)),
        (convnet(3, 4, (8, 6)), (5, 3, 4, 6)),
        (convnet(3, 4, (8,), kernel=5, dropout=0.5), (5, 3, 4, 6)),
    ],
)
def test_conditioners_start_at_zero_and_train_every_parameter(
    net, shape, scramble
):
    x = torch.randn(shape)
    assert not net(x).any()
    assert net(x).shape == (5, 4, *shape[2:])
    scramble(net)(x).square().sum().backward()
    assert all(p.grad.any() for p in net.parameters())
    dropped = any(isinstance(m, nn.Dropout) for m in net.modules())
    assert torch.equal(net(x), net(x)) != dropped
    assert torch.equal(net.eval()(x), net(x))


def test_a_residual_block_adds_to_its_input():
    net = residual(4, 4, (4, 9))
    assert [tuple(p.shape) for p in net[2].inner.parameters()][::2] == [
        (9, 4),
        (4, 9),
    ]
    with torch.no_grad():
        for block in net[1:3]:
            for p in block.parameters():
                p.zero_()
        x = torch.randn(3, 4)
        assert torch.equal(net[2](net[1](x)), x)


def test_networks_use_the_kernel_and_activation_that_they_are_given():
    net = convnet(2, 3, (4, 5), nn.Tanh, kernel=5)
    layers = [m for m in net if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in layers] == [(5, 5)] * 3
    assert net(torch.zeros(1, 2, 6, 7)).shape == (1, 3, 6, 7)
    for f in (net, residual(2, 3, (4, 5), nn.Tanh)):
        bends = [m for m in f.modules() if isinstance(m, (nn.Tanh, nn.SiLU))]
        assert len(bends) in (2, 5)
        assert all(isinstance(m, nn.Tanh) for m in bends)


def test_networks_leave_units_out_as_often_as_they_are_told():
    for make in (mlp, convnet, residual):
        net = make(2, 3, (4, 5), dropout=0.3)
        each = net.named_modules(remove_duplicate=False)
        rates = [m.p for _, m in each if isinstance(m, nn.Dropout)]
        assert rates == [0.3] * 2


def test_sizes_are_whole_numbers_of_any_kind():
    for n in (np.int64, np.uint8, torch.tensor):
        assert repr(convnet(n(2), n(3), (n(4),), kernel=n(5))) == repr(
            convnet(2, 3, (4,), kernel=5)
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: convolution(2, 2, 4), "kernel: expected an odd number, got 4"),
        (lambda: convolution(2, 2, -1), "kernel: expected"),
        (lambda: convnet(2.0, 2), "n_in: expected"),
        (lambda: convnet(2, 0), "n_out: expected"),
        (lambda: residual("a", 2), "n_in: expected"),
        (lambda: residual(2, None), "n_out: expected"),
        (lambda: residual(2, 2, dropout=math.nan), "dropout: expected a finite number"),
        (lambda: convnet(2, 2, dropout=1.5), "dropout: expected a finite number"),
        (lambda: residual(2, 2, activation=nn.SiLU()), r"activation: .*, got SiLU\(\)"),
        (lambda: convnet(2, 2, activation="relu"), "activation: .* got 'relu'"),
        (lambda: residual(2, 2, layer=nn.Linear(2, 2)), "layer: .* got Linear"),
        (lambda: residual(2, 2, layer=nn.Tanh), "layer: .* which says"),
        (lambda: ResidualBlock(nn.Tanh), "inner: expected modules, got <class"),
    ],
)  # fmt: skip
def test_refusals_say_what_came_and_what_was_expected(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        wrong()
