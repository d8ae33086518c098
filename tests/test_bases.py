"""Each base has mass one, samples what it says, and moves, copies and learns with its flow."""

import copy
import io
import math
import pickle
import re
from functools import partial

import pyro.distributions as pdist
import pytest
import torch
import torch.distributions as D
from helpers import many
from torch.testing import assert_close

from flowcourse.bases import (
    DiagonalGaussian,
    GaussianMixture,
    TorchBase,
    Uniform,
)
from flowcourse.core import Compose, Flow, StandardNormal
from flowcourse.coupling import RealNVP
from flowcourse.elementwise import AffineMap, Elementwise
from flowcourse.quadrature import total_mass
from flowcourse.scalar_maps import TanhMap

inf, nan = math.inf, math.nan


def bases():
    return {
        "normal": StandardNormal(2),
        "gaussian": DiagonalGaussian(
            2, loc=torch.tensor([1.0, -2.0]), scale=0.5
        ),
        "mixture": GaussianMixture(
            torch.tensor([[0.0, 0.0], [4.0, 1.0]]),
            0.7,
            weights=torch.tensor([1.0, 3.0]),
        ),
        "uniform": Uniform(2, low=-1.0, high=torch.tensor([1.0, 3.0])),
        "torch normal": TorchBase(
            D.Independent(D.Normal(torch.tensor([0.0, 1.0]), 2.0), 1)
        ),
        "torch full": TorchBase(
            D.MultivariateNormal(
                torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
            )
        ),
        "torch mixture": TorchBase(
            D.MixtureSameFamily(
                D.Categorical(torch.tensor([0.3, 0.7])),
                D.Independent(
                    D.Normal(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), 1.0), 1
                ),
            )
        ),
        "pyro": TorchBase(
            pdist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)
        ),
    }


@pytest.mark.parametrize("name", bases())
def test_a_base_has_mass_one_and_samples_what_it_says(name):
    base = bases()[name].double()
    weigh = partial(total_mass, base.log_prob, 2, dtype=torch.float64)
    mass = weigh(-1.0, 3.0) if name == "uniform" else weigh()
    assert_close(mass, torch.ones_like(mass), atol=1e-3, rtol=0)
    z = base.sample((20_000,), torch.Generator().manual_seed(1))
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    part = weigh(low.tolist(), high.tolist()).item()
    share = ((z > low) & (z < high)).all(-1).double().mean().item()
    assert abs(share - part) < 5 * math.sqrt(part * (1 - part) / 20_000) + 1e-3


@pytest.mark.parametrize("name", bases())
def test_a_base_honours_its_generator_and_leaves_the_global_one_alone(name):
    base = bases()[name]
    before = torch.get_rng_state()
    one, two, other = (
        base.sample((5,), torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("name", bases())
def test_a_base_moves_copies_and_pickles_with_the_flow(name):
    flow = Flow(RealNVP(2, 2, hidden=(4,)), bases()[name])
    x = flow.sample(4)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    fresh = Flow(RealNVP(2, 2, hidden=(4,)), bases()[name])
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.log_prob(x), flow.log_prob(x))
    double = copy.deepcopy(flow).double()
    assert double.sample(4).dtype == torch.float64
    assert_close(
        double.log_prob(x.double()),
        flow.log_prob(x).double(),
        atol=1e-4,
        rtol=1e-5,
    )
    # every tensor has moved, none was left behind
    meta = copy.deepcopy(flow.base).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())


def test_trainable_bases_learn_and_keep_a_positive_scale():
    base = DiagonalGaussian(1)
    with torch.no_grad():
        base.raw_scale.fill_(-200.0)  # softplus underflows to zero here
    assert (base.scale > 0).all() and base.scale.log().isfinite().all()
    base = DiagonalGaussian(2, loc=3.0, scale=0.25)
    assert_close(base.scale, torch.full((2,), 0.25))
    for trained in (base, GaussianMixture(torch.randn(3, 2))):
        trained.log_prob(torch.randn(7, 2)).sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0
            for p in trained.parameters()
        )


@pytest.mark.parametrize(
    "bad", [D.Normal(torch.zeros(2), 1.0), D.Normal(0.0, 1.0)]
)
def test_a_torch_base_wants_one_event(bad):
    with pytest.raises(ValueError, match="^base: expected"):
        Flow(RealNVP(2), bad)


def test_a_torch_base_refuses_what_it_cannot_move():
    hidden = D.TransformedDistribution(
        many(D.Normal, 0.0, 1.0), [D.AffineTransform(torch.ones(2), 2.0)]
    )
    with pytest.raises(ValueError, match="cannot move with the flow"):
        Flow(RealNVP(2), D.Independent(hidden, 0))
    with pytest.raises(
        ValueError,
        match="^base: expected a Base or a torch distribution, got int",
    ):
        Flow(RealNVP(2), 3)


@pytest.mark.parametrize(
    "base",
    [
        StandardNormal(2),
        DiagonalGaussian(2),
        GaussianMixture(torch.zeros(3, 2)),
        Uniform(2),
        TorchBase(many(D.Normal, 0.0, 1.0)),
        TorchBase(many(D.Uniform, 0.0, 1.0)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_the_density_at_nan_is_nan(base):
    z = torch.tensor([[nan, 0.5], [0.5, 0.5], [nan, 9.0]])
    assert base.log_prob(z).isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(
    "make",
    [
        lambda: StandardNormal(2),
        lambda: DiagonalGaussian(2, 1.0, 2.0),
        lambda: Uniform(2, -1.0, 1.0),
        lambda: GaussianMixture([[0.0, 1.0], [2.0, 3.0]], 0.5, [1.0, 2.0]),
    ],
)
def test_a_base_is_made_on_the_default_device(make):
    with torch.device("meta"):
        maps = Elementwise(2, AffineMap()), Elementwise(2, TanhMap())
        flow = Flow(Compose(*maps), make())
        tensors = [*flow.parameters(), *flow.buffers()]
        assert tensors and all(t.is_meta for t in tensors)
        x = flow.sample(5)
        assert x.is_meta and flow.log_prob(x).is_meta
        assert flow().log_prob(x).shape == (5,)
        transform = flow.bijection.as_transform(cache_size=1)
        z = flow.base.sample(5)
        assert transform.log_abs_det_jacobian(z, transform(z)).is_meta
    cpu = make()
    assert not any(t.is_meta for t in [*cpu.parameters(), *cpu.buffers()])


x = torch.zeros(5, 2)
MISTAKES = {
    "a seed as a torch base's generator": (
        lambda: TorchBase(many(D.Normal, 0.0, 1.0)).sample(3, 0),
        "generator: expected a torch.Generator, got int",
    ),
    "no sample of a base": (
        lambda: StandardNormal(2).sample(2.0),
        "shape: expected a whole number of at least 0, got 2.0",
    ),
    "noise of another shape": (
        lambda: Flow(RealNVP(2), DiagonalGaussian(2)).rsample_and_log_prob(
            noise=torch.zeros(5, 3)
        ),
        "noise: DiagonalGaussian expects last dimension 2",
    ),
    "noise in two parts": (
        lambda: Flow(RealNVP(2), Uniform(2)).rsample_and_log_prob(noise=(x, x)),
        "noise: Uniform expects a floating-point tensor, got tuple",
    ),
    "noise in one part": (
        lambda: GaussianMixture(torch.zeros(3, 2)).from_noise(x),
        "noise: GaussianMixture expects the two tensors",
    ),
    "a base in a base": (
        lambda: TorchBase(StandardNormal(2)),
        "base: expected a torch distribution, got StandardNormal",
    ),
    "loc NaN": (lambda: DiagonalGaussian(2, nan), "loc: expected finite"),
    "loc infinite": (lambda: DiagonalGaussian(2, inf), "loc: expected finite"),
    "loc a word": (lambda: DiagonalGaussian(2, "a"), "loc: expected finite"),
    "loc complex": (
        lambda: DiagonalGaussian(2, torch.zeros(2) + 1j),
        "loc: expected finite",
    ),
    "loc too long": (
        lambda: DiagonalGaussian(2, torch.zeros(3)),
        "loc: expected a number, or numbers that broadcast to (2,), got shape",
    ),
    "scale NaN": (
        lambda: DiagonalGaussian(2, scale=nan),
        "scale: expected finite numbers above 0, got nan",
    ),
    "scale too long": (
        lambda: DiagonalGaussian(2, scale=torch.ones(3)),
        "scale: expected a number, or numbers that broadcast to (2,)",
    ),
    "locs NaN": (
        lambda: GaussianMixture([[nan, 0.0]]),
        "loc: expected finite numbers, got [[nan, 0.0]]",
    ),
    "scales infinite": (
        lambda: GaussianMixture(torch.zeros(3, 2), inf),
        "scale: expected finite numbers above 0, got inf",
    ),
    "weights NaN": (
        lambda: GaussianMixture(torch.zeros(2, 2), weights=[1.0, nan]),
        "weights: expected finite numbers above 0, got [1.0, nan]",
    ),
    "weights of words": (
        lambda: GaussianMixture(torch.zeros(2, 2), weights="ab"),
        "weights: expected finite numbers",
    ),
    "the whole line": (
        lambda: Uniform(2, -inf, inf),
        "low: expected finite numbers, got -inf",
    ),
    "an end NaN": (lambda: Uniform(2, 0.0, nan), "high: expected finite"),
    "a width that overflows": (
        lambda: Uniform(1, -3e38, 3e38),
        "high: expected above low",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
