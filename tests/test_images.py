"""Images: bookkeeping of levels, the start from data, Glow beside its plain form, and the bound of dequantisation."""

import math

import pytest
import torch
from helpers import noise, shaken
from torch import nn
from torch.func import hessian, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from flowcourse.bases import Uniform
from flowcourse.conditioners import residual
from flowcourse.core import Bijection, Compose, Flow
from flowcourse.coupling import Coupling, channel, checkerboard
from flowcourse.elementwise import Elementwise
from flowcourse.images import (
    ActNorm,
    Dequantisation,
    Glow,
    GlowSteps,
    ImageCoupling,
    LogitMap,
    MultiScale,
    Squeeze,
    noise_flow,
)
from flowcourse.kernels_images import _sums, _windows
from flowcourse.linear import PLU
from flowcourse.objectives import MaximumLikelihood
from flowcourse.quadrature import total_mass
from flowcourse.trainer import fit


def make_glow(shape=(1, 4, 4), **options):
    """A small Glow in float64, awake."""
    torch.manual_seed(0)
    return shaken(Glow(shape, steps=2, hidden=(8,), **options).double(), 0.5)


# --- Squeeze


def test_squeeze_is_that_of_torch_in_any_batch_shape():
    x = torch.arange(96.0).reshape(2, 3, 1, 4, 4)
    z, ladj = Squeeze().inverse(x)
    assert torch.equal(z, F.pixel_unshuffle(x, 2))
    assert torch.equal(Squeeze().push(z), x)
    assert ladj.shape == (2, 3) and not ladj.any()
    assert Squeeze().inverse(x[:0])[0].shape == (0, 3, 4, 2, 2)


@pytest.mark.parametrize(
    ("way", "shape", "said"),
    [
        ("inverse", (1, 3, 4), "^x: Squeeze expects an even height and width"),
        (
            "inverse",
            (1, 4, 5),
            r"even height and width, got event shape \(1, 4",
        ),
        ("forward", (6, 2, 2), "^z: Squeeze expects a number of channels"),
    ],
)
def test_squeeze_names_sizes_that_do_not_fit(way, shape, said):
    with pytest.raises(ValueError, match=said):
        getattr(Squeeze(), way)(torch.zeros(2, *shape))


# --- MultiScale


def test_levels_move_each_number_once():
    # without parameters: a permutation of the vector's numbers
    f = MultiScale(
        Compose(PLU((8, 1, 2), bias=False), Squeeze()),
        Compose(PLU((4, 2, 4), bias=False), Squeeze()),
    )
    assert f.event_shape == (32,) and f.event_dim_out == 3
    assert f.event_shape_out((32,)) == (1, 4, 8)
    assert f.event_shape_in((1, 4, 8)) == (32,)
    z = torch.arange(32.0).expand(3, 32)
    x, ladj = f.forward(z)
    assert torch.equal(x[0].flatten().sort().values, z[0])
    assert torch.equal(f.inverse(x)[0], z) and not ladj.any()
    # the coarsest part comes first, and what comes anew has higher channels
    fine = F.pixel_unshuffle(x[0], 2)
    assert torch.equal(fine[2:].flatten(), z[0, 16:])
    assert torch.equal(F.pixel_unshuffle(fine[:2], 2).flatten(), z[0, :16])


def test_ladj_is_the_sum_of_the_levels():
    f, z = make_glow(), noise(5, 16)
    x, ladj = f.forward(z)
    J = vmap(jacrev(lambda z: f.forward(z)[0].flatten()))(z)
    assert_close(ladj, torch.linalg.slogdet(J).logabsdet)
    assert_close(f.inverse(x), (z, -ladj))
    coarse, fine = f.levels
    inner, one = coarse.forward(z[:, :8].view(5, 8, 1, 1))
    outer = torch.cat([inner, z[:, 8:].view(5, 2, 2, 2)], 1)
    assert_close(fine.forward(outer)[1] + one, ladj)


def test_what_is_factored_out_is_decided_by_what_goes_on():
    f = make_glow()
    prior = f.levels[1].bijections[0]
    assert isinstance(prior, Coupling)
    z = noise(4, 2, 2)
    assert torch.equal(prior(z)[0][:2], z[:2])
    assert not torch.allclose(prior(z)[0][2:], z[2:])
    first = make_glow(prior=False).levels[1].bijections[0]
    assert isinstance(first, GlowSteps)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ((), "^levels: MultiScale expects at least one"),
        ((3,), r"^levels\[0\]: expected a bijection"),
        ((PLU(4),), r"^levels\[0\]: PLU has to lead from images"),
        ((Squeeze(),), r"^levels\[0\]: Squeeze has to lead from images"),
        (
            (PLU((2, 2, 2)), PLU((2, 2, 2))),
            r"^levels\[1\]: PLU takes events of shape \(2, 2, 2\), expected more",
        ),
        ((PLU((2, 2, 2)), PLU((4, 4, 4))), "channels of 2 x 2"),
        (
            (Elementwise((1, 2, 2), LogitMap()), PLU((2, 2, 2))),
            r"^levels\[0\]: Elementwise has to take",
        ),
        (
            (PLU((1, 2, 2), context_dim=2), PLU((2, 2, 2), context_dim=3)),
            "^levels: expected one context_dim",
        ),
    ],
)
def test_levels_that_do_not_fit_are_named(levels, said):
    with pytest.raises(ValueError, match=said):
        MultiScale(*levels)


def test_glow_names_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="^event_shape: expected a height and"):
        Glow((1, 6, 6))
    with pytest.raises(ValueError, match="mixing"):
        Glow((1, 8, 8), mixing="rotation")
    with pytest.raises(ValueError, match="^steps"):
        Glow((1, 8, 8), steps=0)


def test_mass_of_the_smallest_glow():
    torch.manual_seed(0)
    f = shaken(GlowSteps((2, 1, 1), 2, hidden=(4,)).double(), 0.5)
    flow = Flow(f).double()
    mass = total_mass(
        lambda x: flow.log_prob(x.reshape(-1, 2, 1, 1)),
        2,
        dtype=torch.float64,
    )
    assert abs(mass - 1) < 1e-3


# --- The quick form beside the plain one


@pytest.mark.parametrize("mixing", ["plu", "permutation"])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("conditioner", [None, "residual"])
def test_steps_equal_the_plain_composition(mixing, context_dim, conditioner):
    torch.manual_seed(0)
    network = None
    if conditioner:

        def network(n_in, n_out, hidden, dropout):
            from flowcourse.conditioners import convolution

            return residual(n_in, n_out, hidden, layer=convolution)

    f = GlowSteps(
        (4, 3, 5),
        3,
        hidden=(8,),
        context_dim=context_dim,
        mixing=mixing,
        conditioner=network,
    ).double()
    shaken(f, 0.5)
    plain = Compose(*f.bijections)
    for batch in ((), (1,), (2, 6), (0,)):
        x = noise(*batch, 4, 3, 5)
        c = noise(*batch[-1:], context_dim) if context_dim else None
        for way in ("forward", "inverse", "push"):
            assert_close(
                getattr(f, way)(x, c), getattr(plain, way)(x, c),
                rtol=1e-10, atol=1e-11,
            )  # fmt: skip
    x = noise(6, 4, 3, 5).requires_grad_()
    inputs = [x, *f.parameters()]
    c = noise(6, context_dim) if context_dim else None
    found, wanted = (
        torch.autograd.grad(
            sum(t.square().sum() for t in g.inverse(x, c)), inputs
        )
        for g in (f, plain)
    )
    assert_close(found, wanted)


def test_steps_keep_single_precision():
    torch.manual_seed(0)
    f = shaken(GlowSteps((4, 4, 4), 4, hidden=(8, 8)), 0.1)
    plain, x = Compose(*f.bijections), torch.randn(16, 4, 4, 4)
    assert_close(f.inverse(x), plain.inverse(x), rtol=1e-4, atol=1e-4)
    assert_close(f.forward(x), plain.forward(x), rtol=1e-4, atol=1e-4)


def test_second_derivatives_and_transforms():
    torch.manual_seed(0)
    f = shaken(GlowSteps((2, 2, 2), 2, hidden=(4, 4)).double(), 0.5)
    x = noise(2, 2, 2)

    def loss(x):
        z, ladj = f.inverse(x)
        return z.square().sum() - ladj

    wanted = hessian(loss)(x)
    assert_close(torch.autograd.functional.hessian(loss, x), wanted)
    rows = noise(3, 2, 2, 2)
    assert_close(vmap(loss)(rows), torch.stack([*map(loss, rows)]))
    compiled = torch.compile(f.inverse, backend="eager", fullgraph=True)
    assert_close(compiled(rows), f.inverse(rows))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sums_are_the_adjoint_of_windows(kernel):
    x, t = noise(2, 3, 4, 5), noise(2, 3, 4, 5 * kernel**2, seed=1)
    wanted = (_windows(x, kernel) * t).sum()
    assert_close((x * _sums(t, kernel)).sum(), wanted)
    one = noise(2, 1, 1, 5 * kernel**2)  # a window larger than the image
    middle = one.unflatten(-1, (kernel**2, 5))[..., kernel**2 // 2, :]
    assert_close(_sums(one, kernel), middle)


def test_a_hook_and_an_unknown_network_are_respected():
    torch.manual_seed(0)
    f, seen = GlowSteps((4, 2, 2), 1, hidden=(4,)), []
    layer = f.bijections[0].conditioner[0]
    layer.register_forward_hook(lambda *_: seen.append(1))
    f.inverse(torch.randn(3, 4, 2, 2))
    assert seen


# --- The start from data


def test_actnorm_starts_from_data_once():
    torch.manual_seed(0)
    x = 3 + torch.tensor([1e-3, 1.0, 50.0])[:, None, None] * torch.randn(
        99, 3, 2, 2
    )
    flow = Flow(ActNorm((3, 2, 2)))
    flow.start(x)
    z, _ = flow.bijection.inverse(x)
    assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    assert_close(
        z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0
    )
    before = flow.bijection.raw.value.clone()
    flow.start(9 * x)
    assert torch.equal(flow.bijection.raw.value, before)
    other = Flow(ActNorm((3, 2, 2)))
    other.load_state_dict(flow.state_dict())
    other.start(9 * x)
    assert torch.equal(other.bijection.raw.value, before)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_constant_channel_keeps_its_scale(context_dim):
    f = ActNorm(2, context_dim=context_dim)
    x = torch.stack([torch.full((8,), 5.1), torch.arange(8.0)], -1)
    c = torch.randn(8, 2) if context_dim else None
    Flow(f).start(x, c)
    z, ladj = f.inverse(x, c)
    assert_close(z[:, 0], torch.zeros(8))
    assert_close(ladj, -x[:, 1].std(correction=0).log().expand(8))


def test_every_layer_of_glow_starts_from_what_comes_to_it():
    torch.manual_seed(0)
    flow = Flow(Glow((1, 8, 8), steps=2, hidden=(8,)))
    x = 5 + 3 * torch.randn(50, 1, 8, 8)
    flow.start(x)
    found = []

    def look(f, x):
        # through the levels by hand
        for part in reversed(f.bijections):
            inner = part.bijections if isinstance(part, GlowSteps) else [part]
            for layer in reversed(inner):
                x, _ = layer.inverse(x)
                if isinstance(layer, ActNorm):
                    found.append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
        return x

    z = look(flow.bijection.levels[1], x)
    look(flow.bijection.levels[0], z[:, :2])
    assert len(found) == 4
    for mean, variance in found:
        assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
        assert_close(variance, torch.ones_like(variance), atol=1e-2, rtol=0)


def test_fit_starts_before_the_first_step_and_not_again(tmp_path):
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(40, 2)
    file = tmp_path / "run.pt"

    def objective():
        torch.manual_seed(1)
        flow = Flow(Compose(PLU(2), ActNorm(2)))
        return MaximumLikelihood(flow)

    options = dict(batch_size=16, lr=0.1, ema=0.9, progress=False)
    whole = objective()
    history = fit(whole, x, steps=6, **options)
    # the first loss is that of standardised data
    assert history.loss[0] < 2 * (1.42 + math.log(3) + 0.3)
    cut = objective()

    def stop(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            cut, x, steps=6, checkpoint=file, checkpoint_every=2,
            callbacks=(stop,), **options,
        )  # fmt: skip
    fresh = objective()
    fit(fresh, x, steps=6, checkpoint=file, resume=True, **options)
    for a, b in zip(fresh.state_dict().values(), whole.state_dict().values()):
        assert torch.equal(a, b)
    # a new run of a trained flow goes on from its own weights
    kept = whole.flow.bijection.bijections[1].raw.value.clone()
    fit(whole, 9 * x, steps=1, lr=1e-12, progress=False)
    assert_close(whole.flow.bijection.bijections[1].raw.value, kept)


def test_a_start_sees_the_whole_first_batch_in_every_process():
    class Noted(MaximumLikelihood):
        seen = None

        def start(self, batch, noise=None):
            Noted.seen = len(batch), self.training
            super().start(batch, noise)

    objective = Noted(Flow(ActNorm(2)))
    fit(objective, torch.randn(40, 2), steps=1, batch_size=16, progress=False)
    assert Noted.seen == (16, True)


# --- Counts


class Same(Bijection):
    """The identity of the unit cube, which sees a context and does nothing with it."""

    domain = codomain = Uniform(1, 0.0, 1.0).support

    def _forward(self, z, context):
        return z, z.new_zeros(z.shape[: z.dim() - self.event_dim])

    _inverse = _forward


def test_uniform_noise_is_a_hand_computation():
    flow = Flow(make_glow()).double()
    objective = Dequantisation(flow, levels=5)
    counts = torch.randint(5, (3, 1, 4, 4), generator=torch.manual_seed(0))
    u = objective.draw(3, torch.Generator().manual_seed(0))
    wanted = flow.log_prob((counts + u) / 5) - 16 * math.log(5)
    assert_close(-objective.losses(counts, u), wanted)
    assert_close(objective(counts, u), -wanted.mean())


def test_the_bound_is_a_bound_and_several_draws_tighten_it():
    # p is known: a normal density cut into cells of length 1 / levels
    levels, dim = 8, 1
    flow = Flow(Elementwise(dim, LogitMap(0.1))).double()
    objective = Dequantisation(flow, levels)
    counts = torch.arange(levels)[:, None]
    edges = torch.arange(levels + 1).double()[:, None] / levels
    cdf = torch.special.ndtr(flow.bijection.inverse(edges)[0][:, 0])
    exact = cdf.diff().log()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        one, many = (
            torch.stack(
                [
                    objective.log_prob(counts, samples=k, generator=g)
                    for _ in range(2000 // k)
                ]
            ).mean(0)
            for k in (1, 50)
        )
    # each mean is known to 0.007
    assert (one < exact + 0.02).all() and (one[[0, -1]] < exact[0] - 0.02).all()
    assert_close(many, exact, atol=0.02, rtol=0)


def test_noise_learns_and_is_a_bound_too():
    torch.manual_seed(0)
    flow = Flow(Elementwise((1, 2, 2), LogitMap(0.1))).double()
    noise_of = noise_flow((1, 2, 2), layers=2, hidden=(8,)).double()
    objective = Dequantisation(flow, 4, noise_of)
    counts = torch.randint(4, (64, 1, 2, 2))
    g = torch.Generator().manual_seed(0)
    edges = torch.arange(5).double()[:, None, None, None] / 4
    z, _ = flow.bijection.inverse(edges.expand(5, 1, 2, 2))
    cells = torch.special.ndtr(z[:, 0, 0, 0]).diff().log()
    exact = cells[counts].sum((1, 2, 3)).mean()
    with torch.no_grad():
        one = objective.log_prob(counts, generator=g).mean()
        many = objective.log_prob(counts, samples=500, generator=g).mean()
    assert one < exact - 0.05
    # now and then a draw in a tail of the noise weighs much
    assert_close(many, exact, atol=0.02, rtol=0)
    # close to uniform at the start
    u = noise_of.sample((), torch.zeros(4000, 4).double(), g)
    assert_close(u.mean(), torch.tensor(0.5).double(), atol=0.01, rtol=0)
    assert_close(u.var(), torch.tensor(1 / 12).double(), atol=2e-3, rtol=0)


def test_class_context_and_glow_train_on_counts():
    torch.manual_seed(0)
    shape = (1, 4, 4)
    flow = Flow(
        Compose(
            Glow(shape, steps=1, hidden=(8,), context_dim=3),
            Elementwise(shape, LogitMap()),
        )
    )
    objective = Dequantisation(flow, 17, noise_flow(shape, 2, (8,)))
    counts, c = torch.randint(17, (40, *shape)), torch.eye(3)[torch.arange(40) % 3]  # fmt: skip
    history = fit(objective, (counts, c), steps=3, progress=False)
    assert all(map(math.isfinite, history.loss))
    assert all(
        part.started for part in flow.modules() if isinstance(part, ActNorm)
    )
    assert flow.sample((), c).shape == (40, *shape)


def test_counts_that_do_not_fit_are_named():
    objective = Dequantisation(Flow(make_glow()), levels=4)
    for counts, said in (
        (torch.full((2, 1, 4, 4), 4), "expected 0 to 3, got 4 to 4"),
        (torch.full((2, 1, 4, 4), 0.5), "expected whole numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            objective.log_prob(counts)
        with pytest.raises(ValueError, match=said):
            fit(objective, counts, steps=1, progress=False)
    with pytest.raises(ValueError, match="^flow: expected a Flow"):
        Dequantisation(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^noise: expected a Flow of events"):
        Dequantisation(Flow(make_glow()), 4, noise_flow((1, 2, 2)))


def test_an_image_as_context_is_seen_where_it_is():
    torch.manual_seed(0)
    f = ImageCoupling(checkerboard((1, 6, 6)), context_dim=36).double()
    shaken(f, 0.5)
    z, c = noise(1, 6, 6), noise(36)
    J = jacrev(lambda c: f.forward(z, c)[0][0, 0, 1])(c).view(6, 6)
    assert J[:4, :5].abs().min() > 0  # convnet's three windows reach so far
    assert not J[5:].any() and not J[:, 5:].any()
    with pytest.raises(ValueError, match="^context_dim: expected a multiple"):
        ImageCoupling(channel((2, 3, 3)), context_dim=10)
