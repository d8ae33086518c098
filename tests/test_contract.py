"""The checker rejects what breaks the contract and names the promise; what keeps it passes."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

from flowcourse.bnaf import BlockAutoregressive
from flowcourse.core import Bijection, Compose, Flow, Inverse
from flowcourse.coupling import RealNVP
from flowcourse.promises import PROMISES
from flowcourse.testing import ContractError, check_bijection


def points(*shape, seed=0):
    return torch.randn(
        12, *shape, generator=torch.Generator().manual_seed(seed)
    )


class Affine(Bijection):
    """`x = z exp(s) + b`, with parameters that may come from the context."""

    def __init__(self, dim=2, context_dim=0):
        super().__init__(dim, context_dim)
        self.s, self.b = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        if context_dim:
            self.net = nn.Linear(context_dim, 2 * dim)
            nn.init.zeros_(self.net.weight)
            nn.init.zeros_(self.net.bias)

    def parameters_at(self, t, context):
        s, b = (self.s, self.b)
        if context is not None:
            more_s, more_b = self.net(context).chunk(2, -1)
            s, b = s + more_s, b + more_b
        return s.expand_as(t), b.expand_as(t)

    def _forward(self, z, context):
        s, b = self.parameters_at(z, context)
        return z * s.exp() + b, s.sum(-1)

    def _inverse(self, x, context):
        s, b = self.parameters_at(x, context)
        return (x - b) * (-s).exp(), -s.sum(-1)


class Sinh(Bijection):
    """Nonlinear and monotone: `x = sinh(asinh(z) + b)`, elementwise; the identity at b = 0."""

    def __init__(self, event_shape, event_dim=1):
        super().__init__(event_shape, event_dim=event_dim)
        self.b = nn.Parameter(torch.zeros(self.event_shape))

    def shift(self, t, b):
        u = t.asinh() + b
        log_slope = (u.cosh() / (1 + t.square()).sqrt()).log()
        return u.sinh(), log_slope.flatten(-self.event_dim).sum(-1)

    def _forward(self, z, context):
        return self.shift(z, self.b)

    def _inverse(self, x, context):
        return self.shift(x, -self.b)


class Permute(Bijection):
    """A fixed order, saved as a buffer."""

    def __init__(self, order):
        super().__init__(len(order))
        self.register_buffer("order", torch.as_tensor(order))

    def _forward(self, z, context):
        return z[..., self.order], z.new_zeros(z.shape[:-1])

    def _inverse(self, x, context):
        return x[..., self.order.argsort()], x.new_zeros(x.shape[:-1])


class Sigmoid(Bijection):
    """Onto the unit interval."""

    @property
    def codomain(self):
        return constraints.independent(constraints.unit_interval, 1)

    def _forward(self, z, context):
        log_slope = nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z)
        return z.sigmoid(), log_slope.sum(-1)

    def _inverse(self, x, context):
        return x.logit(), -(x.log() + (-x).log1p()).sum(-1)


class Flatten(Bijection):
    """Images to vectors."""

    @property
    def event_dim_out(self):
        return 1

    def event_shape_out(self, event_shape):
        return (math.prod(event_shape),)

    def event_shape_in(self, event_shape):
        return self.event_shape

    def _forward(self, z, context):
        return z.flatten(-3), z.new_zeros(z.shape[:-3])

    def _inverse(self, x, context):
        return x.unflatten(-1, self.event_shape), x.new_zeros(x.shape[:-1])


no_identity = {"identity": "it changes its input by design"}


@pytest.mark.parametrize(
    "make, shape, context_dim, exempt",
    [
        (lambda: Affine(), (2,), 0, {}),
        (lambda: Affine(1), (1,), 0, {}),
        (lambda: Affine(2, context_dim=3), (2,), 3, {}),
        (lambda: Compose(Permute([2, 0, 1]), Affine(3)), (3,), 0, no_identity),
        (lambda: Sinh(4), (4,), 0, {}),
        (lambda: Sinh((1,)), (1,), 0, {}),
        (lambda: Sinh((1, 2, 2), event_dim=3), (1, 2, 2), 0, {}),
        (lambda: Compose(Flatten((1, 2, 2)), Sinh(4)), (1, 2, 2), 0, {}),
        (lambda: Compose(Affine(1), Sigmoid(1)), (1,), 0, no_identity),
        (lambda: Compose(Sigmoid(2), Inverse(Sigmoid(2))), (2,), 0, {}),
        (lambda: RealNVP(3, layers=2, hidden=(8,), context_dim=2), (3,), 2, {}),
    ],
    ids=[
        "affine",
        "affine in 1-D",
        "affine with context",
        "permutation and affine",
        "sinh",
        "sinh in 1-D",
        "image",
        "flatten",
        "onto an interval",
        "through an interval",
        "realnvp",
    ],
)
def test_what_keeps_the_contract_passes(make, shape, context_dim, exempt):
    context = points(context_dim, seed=1) if context_dim else None
    report = check_bijection(make(), points(*shape), context, exempt=exempt)
    assert report.ok and not report.broken
    assert {f.promise for f in report.findings} >= set(PROMISES) - {
        "mass",
        *exempt,
    }
    assert ("mass" in {f.promise for f in report.findings}) == (
        math.prod(shape) <= 2
    )


def test_a_map_from_an_interval_keeps_it_too():
    f, z = Inverse(Sigmoid(1)), points(1).sigmoid()
    report = check_bijection(f, z, exempt=no_identity)
    assert "mass" in {finding.promise for finding in report.findings}


class FlippedSign(Affine):
    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z, -ladj


class BothSignsFlipped(Affine):
    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return x, -ladj

    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z, -ladj


class ForgottenDimension(Affine):
    def _forward(self, z, context):
        x, _ = super()._forward(z, context)
        return x, self.s[:-1].sum().expand(z.shape[:-1])


class DetachedLadj(Affine):
    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z, ladj.detach()


class DetachedInput(Sinh):
    def _forward(self, z, context):
        x, _ = super()._forward(z, context)
        return x, super()._forward(z.detach(), context)[1]


class WrongDtype(Affine):
    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return x, ladj.float()


class WrongDevice(Affine):
    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z, ladj.to("meta")


class DefaultDtype(Bijection):
    def _forward(self, z, context):
        return z, torch.zeros(z.shape[:-1])

    _inverse = _forward


class DefaultPrecision(Bijection):
    """The dtype is right, but the constant has only as many digits as the default dtype."""

    def _forward(self, z, context):
        return z * torch.tensor(1.1), z.new_full(
            z.shape[:-1], self.event_shape[0] * math.log(1.1)
        )

    def _inverse(self, x, context):
        return x / torch.tensor(1.1), x.new_full(
            x.shape[:-1], -self.event_shape[0] * math.log(1.1)
        )


class FixedDtype(Bijection):
    def _forward(self, z, context):
        return z @ torch.eye(2, dtype=torch.float32), z.new_zeros(z.shape[:-1])

    _inverse = _forward


class BatchMean(Affine):
    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return x - self.b * x.detach().flatten(0, -2).mean(0), ladj


class BatchNormInverse(Affine):
    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z + 1e-3 * z.max(), ladj


class NoBatch(Affine):
    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return x, ladj.reshape(len(z))


class ContextCat(Affine):
    """Asks for a context of exactly the batch shape."""

    def parameters_at(self, t, context):
        n = t.shape[-1]
        both = torch.cat([t, context], -1)
        return super().parameters_at(t, both[..., n:])


class FirstContext(Affine):
    """Takes the first of several contexts for one point."""

    def forward(self, z, context=None):
        several = context is not None and context.dim() > z.dim()
        return super().forward(z, context[0] if several else context)


class ContextDetached(Affine):
    def parameters_at(self, t, context):
        return super().parameters_at(t, context.detach())


class AsksForOneBlock(Affine):
    def _forward(self, z, context):
        return super()._forward(z.view(-1).view(z.shape), context)


class AsksForRows(Affine):
    def _inverse(self, x, context):
        x.flatten().max()
        return super()._inverse(x, context)


class LostAlone(Affine):
    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z, ladj if len(x) > 1 else ladj * math.nan


class RoughInverse(Affine):
    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z * (1 + 1e-4), ladj


class FewBisections(Sinh):
    """An inverse by halving an interval too few times, its derivatives right."""

    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z + ((z * 2**14).floor() / 2**14 - z).detach(), ladj


class Unsaved(Bijection):
    def __init__(self):
        super().__init__(3)
        self.order = torch.tensor([2, 0, 1])

    _forward, _inverse = Permute._forward, Permute._inverse


class UnsavedMask(Affine):
    def __init__(self):
        super().__init__()
        self.mask = torch.tensor([True, False])

    def parameters_at(self, t, context):
        s, b = super().parameters_at(t, context)
        return s * self.mask, b


class NotPersistent(Affine):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)

    def parameters_at(self, t, context):
        s, b = super().parameters_at(t, context)
        return s, b + self.offset * self.s.square()


class Lambda(Affine):
    def __init__(self):
        super().__init__()
        self.activation = lambda s: s

    def parameters_at(self, t, context):
        s, b = super().parameters_at(t, context)
        return self.activation(s), b


class Tanh(Bijection):
    """Claims the whole line."""

    def _forward(self, z, context):
        return z.tanh(), (1 - z.tanh().square()).log().sum(-1)

    def _inverse(self, x, context):
        return x.atanh(), -(1 - x.square()).log().sum(-1)


class SmallDomain(Bijection):
    """Only |z| < 1 reaches anything: two thirds of a normal's mass."""

    def _forward(self, z, context):
        return z.atanh(), -(1 - z.square()).log().sum(-1)

    def _inverse(self, x, context):
        return x.tanh(), (1 - x.tanh().square()).log().sum(-1)


class WhereTrap(Bijection):
    """The identity, but the square root of zero has no slope for autograd."""

    def _forward(self, z, context):
        x = torch.where(z == 0, z, z.sign() * z.square().sqrt())
        return x, z.new_zeros(z.shape[:-1])

    def _inverse(self, x, context):
        return x.clone(), x.new_zeros(x.shape[:-1])


class TrapInParameters(Affine):
    def parameters_at(self, t, context):
        s, b = super().parameters_at(t, context)
        return s + 0 * self.s.square().sum().sqrt(), b


class WrongGradient(Affine):
    """The value is right; the gradient in a parameter is a tenth too small."""

    def parameters_at(self, t, context):
        s, b = super().parameters_at(t, context)
        return s, 0.9 * b + 0.1 * b.detach()


class LadjPerCoordinate(Affine):
    def _forward(self, z, context):
        return super()._forward(z, context)[0], self.s.expand_as(z)


class ScalarLadj(Affine):
    def _forward(self, z, context):
        return super()._forward(z, context)[0], self.s.sum()


class OnlyAPoint(Affine):
    def _forward(self, z, context):
        return super()._forward(z, context)[0]


class Collapse(Affine):
    """Not a bijection where the parameters are not zero."""

    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return torch.where(self.s[0] == 0, x, x[..., :1].expand_as(x)), ladj


class Shifted(Affine):
    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return x + 1e-4, ladj

    def _inverse(self, x, context):
        return super()._inverse(x - 1e-4, context)


# class: the promise that must be named first, and words of the message
rejected = {
    FlippedSign: ("ladj", "ladj of inverse against slogdet"),
    BothSignsFlipped: ("ladj", "opposite sign"),
    ForgottenDimension: ("ladj", "ladj of forward against slogdet"),
    DetachedLadj: (
        "gradients",
        "gradient of ladj of inverse in parameter s (is it detached?)",
    ),
    DetachedInput: (
        "gradients",
        "gradient of ladj of forward in z (is it detached?)",
    ),
    WrongDtype: ("dtype", "ladj of forward is float32"),
    WrongDevice: ("dtype", "ladj of inverse is float64 on meta"),
    DefaultDtype: ("dtype", "with default dtype float32"),
    DefaultPrecision: ("dtype", "under two default dtypes"),
    FixedDtype: ("dtype", "RuntimeError"),
    BatchMean: ("rows", "x of forward for a row alone"),
    BatchNormInverse: ("rows", "z of inverse for a row alone"),
    NoBatch: ("batch", "forward without batch"),
    ContextCat: ("batch", "forward expanded: RuntimeError"),
    FirstContext: ("batch", "forward with several contexts"),
    ContextDetached: (
        "gradients",
        "gradient of x of forward in context (is it detached?)",
    ),
    AsksForOneBlock: ("batch", "forward not contiguous: RuntimeError"),
    AsksForRows: ("batch", "inverse of an empty batch"),
    LostAlone: ("rows", "ladj of inverse for a row alone"),
    RoughInverse: ("round trip", "x against forward(inverse(x))"),
    FewBisections: ("round trip", "off by"),
    Unsaved: ("saved", "not in it: order"),
    UnsavedMask: ("saved", "not in it: mask"),
    NotPersistent: ("saved", "not in it: offset"),
    Lambda: ("saved", "pickle does not restore the map"),
    Tanh: ("onto", "inverse gives values that are not finite"),
    SmallDomain: ("mass", "mass 0.68269 against 1"),
    WhereTrap: ("gradients", "gradient of x of forward in z is not finite"),
    TrapInParameters: ("gradients", "in parameter s is not finite"),
    WrongGradient: ("gradients", "gradient of x of forward in parameter b"),
    LadjPerCoordinate: (
        "shape",
        "ladj of forward has shape (12, 2), expected (12,)",
    ),
    ScalarLadj: ("shape", "ladj of forward has shape (), expected (12,)"),
    OnlyAPoint: ("shape", "expected the pair (point, ladj)"),
    Collapse: ("onto", "no bijection"),
    Shifted: ("identity", "x against z: off by"),
}
make = {
    DefaultDtype: lambda: DefaultDtype(2),
    DefaultPrecision: lambda: DefaultPrecision(2),
    FixedDtype: lambda: FixedDtype(2),
    ContextCat: lambda: ContextCat(2, context_dim=3),
    FirstContext: lambda: FirstContext(2, context_dim=3),
    ContextDetached: lambda: ContextDetached(2, context_dim=3),
    DetachedInput: lambda: DetachedInput(2),
    FewBisections: lambda: FewBisections(2),
    Tanh: lambda: Tanh(1),
    SmallDomain: lambda: SmallDomain(1),
    WhereTrap: lambda: WhereTrap(2),
}


@pytest.mark.parametrize("broken", rejected, ids=lambda c: c.__name__)
def test_what_breaks_it_is_rejected_by_name(broken):
    promise, words = rejected[broken]
    f = make.get(broken, broken)()
    z = points(*f.event_shape)
    if broken is SmallDomain:
        z = 0.9 * z.tanh()
    if broken is WhereTrap:
        z[3, 1] = 0
    with pytest.raises(ContractError) as caught:
        check_bijection(
            f, z, points(f.context_dim, seed=1) if f.context_dim else None
        )
    message = str(caught.value)
    first = message.splitlines()[1].strip()
    assert first.startswith(f"{promise} ("), message
    assert words in message, message
    if broken is WhereTrap:
        assert "0]" in message, message  # the point itself is shown
    assert any(f.promise == promise for f in caught.value.report.broken)


def test_each_promise_can_be_broken():
    named = {promise for promise, _ in rejected.values()}
    assert named | {"round trip in z", "cancel"} == set(PROMISES)


class LossyZ(Affine):
    """Rounds small differences away, and gives back a point that has the same image."""

    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z + (1e-11 - 0.0) * z.detach().sin(), ladj


def test_the_round_trip_in_z_is_sharper_than_the_one_in_x():
    with pytest.raises(ContractError, match="round trip in z") as caught:
        check_bijection(LossyZ(), points(2), dtypes=(torch.float64,))
    assert {f.promise for f in caught.value.report.broken} == {
        "round trip in z"
    }


class LadjDrifts(Affine):
    """Each `ladj` is within its own tolerance; their sum shows that they drift apart."""

    def __init__(self, drift):
        super().__init__()
        self.drift = drift

    def _forward(self, z, context):
        x, ladj = super()._forward(z, context)
        return x, ladj + self.drift

    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        return z, ladj + self.drift


class Hinge(Bijection):
    """Slope 1 on the left and 4 on the right of zero, bent within 1e-8; gradients as `share` says."""

    def __init__(self, share=1.0):
        super().__init__(1)
        self.share, self.log_width = (
            share,
            nn.Parameter(torch.tensor([math.log(1e-8)])),
        )

    def log_slope(self, z, width):
        log_slope = (2.5 + 1.5 * z / torch.hypot(z, width)).log().sum(-1)
        return self.share * log_slope + (1 - self.share) * log_slope.detach()

    def _forward(self, z, context):
        width = self.log_width.exp()
        return 2.5 * z + 1.5 * (torch.hypot(z, width) - width), self.log_slope(
            z, width
        )

    def _inverse(self, x, context):
        width = self.log_width.exp()
        y = x + 1.5 * width
        z = (2.5 * y - 1.5 * torch.hypot(y, 2 * width)) / 4
        return z, -self.log_slope(z, width)


@pytest.mark.parametrize("share", [1.0, 0.999, 1.001, 0.0, -1.0, 2.0, 1e4])
def test_gradients_are_judged_at_the_map_s_own_scale(share):
    options = {"levels": (0.0,), "dtypes": (torch.float64,)}
    options["exempt"] = {
        "identity": "a hinge",
        "mass": "its jump is not the subject",
    }
    z = 1e-8 * points(1)
    if share == 1.0:
        assert check_bijection(Hinge(), z, **options).ok
    else:
        with pytest.raises(ContractError, match="gradient of ladj of"):
            check_bijection(Hinge(share), z, **options)


@pytest.mark.parametrize("drift", [0.8e-8, -0.8e-8])
def test_the_two_ladj_must_cancel(drift):
    with pytest.raises(ContractError, match="cancel") as caught:
        check_bijection(
            LadjDrifts(drift), points(2), dtypes=(torch.float64,), levels=(0.0,)
        )
    assert {f.promise for f in caught.value.report.broken} == {"cancel"}


class Waves(Affine):
    """The last digits of `s` count, and the way back computes the scale in another way."""

    def __init__(self, start, pace):
        super().__init__()
        nn.init.constant_(self.s, start)
        self.pace = pace

    def _forward(self, z, context):
        scale = 1 + 0.5 * (self.pace * self.s).sin()
        return z * scale + self.b, scale.log().sum().expand(z.shape[:-1])

    def _inverse(self, x, context):
        scale = 1 + 0.5 * (self.pace * (self.s / 0.7 * 0.7)).sin()
        ladj = -scale.log().sum().expand(x.shape[:-1])
        return (x - self.b) / scale, ladj


@pytest.mark.parametrize(("start", "pace"), [(0.0, 1e5), (1e5, 1.0)])
def test_rounding_that_wild_parameters_cost_is_allowed(start, pace):
    f = Waves(start, pace)
    assert check_bijection(f, points(2), levels=(1.0, 3.0)).ok


def test_as_made_no_such_rounding_is_allowed():
    f = Waves(100_003.0, 1.0)
    with pytest.raises(ContractError, match="float32, as made"):
        check_bijection(f, points(2), levels=(0.0,), exempt=no_identity)


class WildAndCoarse(Affine):
    """Far from its start and in float32, one of its results loses digits."""

    def __init__(self, way, result, digits):
        super().__init__()
        self.way, self.result, self.digits = way, result, digits

    def coarse(self, way, out):
        if out[0].dtype == torch.float64 or self.s.abs().max() < 0.1:
            return out
        if way == self.way:
            changed = out[self.result] * (1 + self.digits)
            out = (*out[: self.result], changed, *out[self.result + 1 :])
        return out

    def _forward(self, z, context):
        return self.coarse("forward", super()._forward(z, context))

    def _inverse(self, x, context):
        return self.coarse("inverse", super()._inverse(x, context))


@pytest.mark.parametrize(
    ("way", "result", "promise"),
    [
        ("forward", 0, "round trip"),
        ("inverse", 0, "round trip"),
        ("forward", 1, "ladj"),
        ("inverse", 1, "ladj"),
    ],
)
def test_lost_digits_are_found_with_wild_parameters_in_float32(
    way, result, promise
):
    f = WildAndCoarse(way, result, 3e-4)
    with pytest.raises(ContractError, match=promise) as caught:
        check_bijection(f, points(2))
    broken = caught.value.report.broken
    assert promise in {f.promise for f in broken}
    assert {f.dtype for f in broken} == {torch.float32}
    assert all(f.level > 0 for f in broken)


class CoarseBlocks(BlockAutoregressive):
    """Its inverse stops early in float32, as if it had halved its bracket too few times."""

    def _inverse(self, x, context):
        z, ladj = super()._inverse(x, context)
        if x.dtype == torch.float32:
            z = z + ((z * 2**8).round() / 2**8 - z).detach()
        return z, ladj


def test_a_coarse_numerical_inverse_is_found_with_wild_parameters():
    options = {"levels": (3.0,), "dtypes": (torch.float32,)}
    assert check_bijection(BlockAutoregressive(2), points(2), **options).ok
    with pytest.raises(ContractError, match="round trip"):
        check_bijection(CoarseBlocks(2), points(2), **options)


class ForgetfulCopy(Affine):
    """Its copy is as made, whatever the original has learned."""

    def __deepcopy__(self, memo):
        other = type(self)()
        if not self.s.any():
            other.load_state_dict(self.state_dict())
        return other.to(self.s.dtype)


def test_a_copy_that_forgets_is_found():
    with pytest.raises(ContractError, match="restored by deepcopy"):
        check_bijection(ForgetfulCopy(), points(2), dtypes=(torch.float64,))


def test_noise_has_the_spread_that_a_level_says():
    class Wide(Affine):
        def __init__(self):
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(500))

        def _forward(self, z, context):
            spreads.add(round(float(self.idle.detach().std()), 1))
            return super()._forward(z + 0 * self.idle.sum(), context)

    spreads = set()
    check_bijection(
        Wide(), points(2), levels=(0.0, 1.0, 3.0), dtypes=(torch.float64,)
    )
    assert sorted(spreads) == pytest.approx([0, 1, 3], abs=0.3)


class Shear(Bijection):
    """A matrix of condition number 4,000, which costs float32 a few digits."""

    def _forward(self, z, context):
        a, b = z.unbind(-1)
        ladj = z.new_full(z.shape[:-1], math.log(1e-3))
        return torch.stack([a + b, a + 1.001 * b], -1), ladj

    def _inverse(self, x, context):
        u, v = x.unbind(-1)
        b = (v - u) / 1e-3
        ladj = x.new_full(x.shape[:-1], -math.log(1e-3))
        return torch.stack([u - b, b], -1), ladj


class AboveOne(Bijection):
    """`x = 1 + exp(z)`, which float32 rounds to 1 at -20."""

    @property
    def codomain(self):
        return constraints.independent(constraints.greater_than(1.0), 1)

    def _forward(self, z, context):
        return 1 + z.exp(), z.sum(-1)

    def _inverse(self, x, context):
        return (x - 1).log(), -(x - 1).log().sum(-1)


def test_what_float32_holds_is_judged_and_what_it_cannot_is_not():
    float32 = {"dtypes": (torch.float32,), "levels": (0.0,)}
    far = check_bijection(Affine(), 1e6 * points(2), **float32)
    steep = check_bijection(Shear(2), points(2), **float32, exempt=no_identity)
    for report in (far, steep):
        assert all(f.judged == f.given for f in report.findings)
    z = torch.cat([points(1), torch.tensor([[-20.0]])])
    report = check_bijection(
        AboveOne(1),
        z,
        **float32,
        exempt=no_identity | {"round trip": "cancels"},
    )
    onto = next(f for f in report.findings if f.promise == "onto")
    assert onto.judged < onto.given


def test_nothing_is_changed():
    f, z = Affine().train(), points(2)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    check_bijection(f, z)
    with pytest.raises(ContractError):
        check_bijection(WrongDtype(), z)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == default
    assert f.training and all(p.grad is None for p in f.parameters())
    assert all(torch.equal(v, before[k]) for k, v in f.state_dict().items())


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    ambient = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        assert check_bijection(Affine(), points(2)).ok
        with pytest.raises(ContractError, match=r"(?m)^  dtype"):
            check_bijection(DefaultDtype(2), points(2))
    finally:
        torch.set_default_dtype(ambient)


def test_exemptions_are_named_and_narrow():
    z = points(2)
    report = check_bijection(Shifted(), z, exempt={"identity": "it shifts"})
    assert "exempt: identity, because it shifts" in repr(report)
    check_bijection(Shifted(), z, exempt={("identity", 0.0): "it shifts"})
    with pytest.raises(ContractError, match="identity"):
        check_bijection(
            Shifted(), z, exempt={("identity", torch.float32): "it shifts"}
        )
    with pytest.raises(
        ValueError, match="exempt: no promise 'identiy'; there are shape, dtype"
    ):
        check_bijection(Shifted(), z, exempt={"identiy": "it shifts"})
    with pytest.raises(ValueError, match="needs a reason"):
        check_bijection(Shifted(), z, exempt={"identity": ""})


@pytest.mark.parametrize(
    "f, z, context, message",
    [
        (
            nn.Linear(2, 2),
            points(2),
            None,
            "bijection: expected a Bijection, got Linear",
        ),
        (
            Affine,
            points(2),
            None,
            "got the class Affine, not one that was made of it",
        ),
        (
            Flow(Affine()),
            points(2),
            None,
            "expected a Bijection, got Flow; check its .bijection",
        ),
        (Affine(), points(2).numpy(), None, "z: .* got ndarray"),
        (Affine(), points(2).to("meta"), None, "z: .* got a meta tensor"),
        (
            Affine().to("meta"),
            points(2),
            None,
            "z: expected points on meta, where the bijection is, got cpu",
        ),
        (Affine(), points(2)[:1], None, "z: expected at least 2 points"),
        (Affine(), points(2)[:0], None, "z: expected at least 2 points"),
        (Affine(), torch.tensor(1.0), None, "z: expected at least 2 points"),
        (Affine(2, 3), points(2), 3, "context: .* got int"),
        (Affine(2, 3), points(2), points(3).long(), "context: .* of int64"),
        (
            Affine(2, 3),
            points(2),
            torch.tensor(1.0),
            r"context: Affine expects shape \(\*batch, 3\), got shape \(\)",
        ),
        (
            Affine(),
            points(3),
            None,
            r"z: expected at least 2 points with events of \(2,\)",
        ),
        (Affine(), points(2)[0], None, "z: expected at least 2 points"),
        (
            Affine(),
            points(2).long(),
            None,
            "z: expected a floating-point tensor, got one of int64",
        ),
        (Affine(), points(2).log(), None, "points lie outside the domain"),
        (
            Affine(2, 3),
            points(2),
            None,
            r"context: Affine expects shape \(\*batch, 3\), got none",
        ),
        (Affine(), points(2), points(3), "context: Affine expects none"),
    ],
)
def test_bad_arguments_are_named(f, z, context, message):
    with pytest.raises(ValueError, match=message):
        check_bijection(f, z, context)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"levels": 1.0}, "levels: expected a tuple of at least one, got 1.0"),
        ({"levels": ()}, "levels: expected a tuple of at least one"),
        ({"levels": (math.nan,)}, "levels: expected a finite number"),
        ({"levels": (-1.0,)}, "levels: expected a finite number of at least 0"),
        ({"dtypes": torch.float32}, "dtypes: expected a tuple"),
        ({"dtypes": (torch.float16,)}, "dtypes: .* got torch.float16"),
        ({"exempt": ["identity"]}, "exempt: expected a dict"),
        ({"seed": 1.5}, "seed: expected a whole number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        check_bijection(Affine(), points(2), **options)


def test_beyond_float32_is_counted_not_blamed():
    class Stretch(Sinh):
        def _forward(self, z, context):
            return z * 1e25, z.new_full(z.shape[:-1], 2 * 25 * math.log(10))

        def _inverse(self, x, context):
            return x / 1e25, x.new_full(x.shape[:-1], -2 * 25 * math.log(10))

    report = check_bijection(Stretch(2), points(2), exempt=no_identity)
    assert report.unjudged and all(
        case.startswith("float32") for case in report.unjudged
    )
    assert "beyond the numbers of the format" in repr(report)
