"""Linear maps: the matrices they claim, their limits, and what their constructors refuse."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import shaken as shaken_as_it_is
from torch.testing import assert_close

from flowcourse.core import Flow
from flowcourse.linear import (
    PLU,
    QR,
    SVD,
    Cayley,
    Diagonal,
    Full,
    Householder,
    LowRank,
    MatrixExponential,
    Permutation,
    Triangular,
)

rotations = {
    "householder": lambda n: Householder(n),
    "householder, one": lambda n: Householder(n, 1),
    "householder, more than the dimension": lambda n: Householder(n, 3 * n),
    "cayley": Cayley,
    "matrix exponential": lambda n: MatrixExponential(n, orthogonal=True),
}
full_rank = {
    "triangular": Triangular,
    "triangular, upper": lambda n: Triangular(n, upper=True),
    "matrix exponential": MatrixExponential,
    "full": Full,
    "plu": PLU,
    "plu, P reverses": lambda n: PLU(
        n, torch.arange(n if isinstance(n, int) else n[0]).flip(0)
    ),
    "qr": QR,
    "svd": SVD,
    "low rank, all": lambda n: LowRank(n, n if isinstance(n, int) else n[0]),
}


def shaken(f, sd=1.0):
    """The map in float64, with noise on its parameters."""
    return shaken_as_it_is(f.double(), sd)


def matrix(f):
    """`A`, of an image flattened."""
    start = torch.zeros(f.event_shape, dtype=next(f.parameters()).dtype)
    n = start.numel()
    return torch.func.jacrev(lambda z: f(z)[0])(start).reshape(n, n).detach()


@pytest.mark.parametrize("make", rotations.values(), ids=rotations)
@pytest.mark.parametrize("sd", [0.0, 1.0, 100.0])
def test_rotations_are_orthogonal(make, sd):
    a = matrix(shaken(make(5), sd))
    assert_close(a @ a.T, torch.eye(5, dtype=a.dtype), atol=1e-10, rtol=0)


def test_reflections_are_the_product_of_single_ones():
    f = shaken(Householder(4, 6, bias=False))
    expected = torch.eye(4, dtype=torch.float64)
    for raw in f.raw().detach().view(6, 3):
        v = torch.cat([torch.ones(1), raw])
        expected = expected @ (torch.eye(4) - 2 * torch.outer(v, v) / (v @ v))
    assert_close(matrix(f), expected)
    assert_close(torch.linalg.det(expected), torch.ones(()).double())
    odd = shaken(Householder(4, 7, bias=False))
    assert_close(torch.linalg.det(matrix(odd)), -torch.ones(()).double())


def test_reflections_begin_apart_from_each_other():
    directions = Householder(6, 12, bias=False).raw().view(6, 2, 5)
    assert_close(directions[:, 0], directions[:, 1])
    assert torch.linalg.matrix_rank(directions[:, 0]) == 5


def test_plu_is_the_product_of_its_factors():
    order = torch.tensor([2, 0, 1])
    f = shaken(PLU(3, order, bias=False))
    a = matrix(f)[order.argsort()]
    minors = torch.stack([torch.linalg.det(a[:k, :k]) for k in (1, 2, 3)])
    log_scale = f.raw().view(3, 3).diagonal().asinh()
    assert_close(minors, log_scale.cumsum(0).exp())


def below(entries):
    """The strict lower triangle that holds the entries row after row, over `sqrt(3)`."""
    a, b, c = entries
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[1, 0], matrix[2, 0], matrix[2, 1] = a, b, c
    return matrix / 3**0.5


def turn(raw):
    """The product of the reflections along `(1, raw)`."""
    product = torch.eye(3, dtype=torch.float64)
    for row in raw.view(-1, 2):
        v = torch.cat([torch.ones(1), row])
        product = product @ (torch.eye(3) - 2 * torch.outer(v, v) / (v @ v))
    return product


def formulas(raw):
    """Of every class the matrix that its page says, given enough raw numbers."""
    eye, r = torch.eye(3, dtype=torch.float64), raw.asinh()
    square, d = r[:9].view(3, 3), r[:3].exp().diag()
    skew = below(r[:3]) - below(r[:3]).T
    upper = eye + square.triu(1) / 3**0.5
    lower = eye + square.tril(-1) / 3**0.5
    return {
        "diagonal": (Diagonal, d),
        "lower": (Triangular, (eye + below(r[3:6])) @ d),
        "upper": (partial(Triangular, upper=True), (eye + below(r[3:6]).T) @ d),
        "cayley": (Cayley, torch.linalg.inv(eye + skew) @ (eye - skew)),
        "exponential": (MatrixExponential, (square / 3**0.5).matrix_exp()),
        "turn": (
            partial(MatrixExponential, orthogonal=True),
            skew.matrix_exp(),
        ),
        "full": (Full, eye + raw[:9].view(3, 3)),
        "lu": (PLU, lower @ square.diagonal().exp().diag() @ upper),
        "qr": (
            partial(QR, reflections=4),
            turn(raw[6:14]) @ d @ (eye + below(r[3:6]).T),
        ),
        "svd": (
            partial(SVD, reflections=2),
            turn(raw[3:7]) @ d @ turn(raw[7:11]).T,
        ),
    }


@pytest.mark.parametrize("name", formulas(torch.zeros(14).double()))
def test_a_matrix_is_what_its_formula_says(name):
    raw = torch.randn(14, dtype=torch.float64)
    make, wanted = formulas(raw)[name]
    f = make(3, bias=False).double()
    with torch.no_grad():
        f.raw.value.copy_(raw[: f.n_params])
    assert_close(matrix(f), wanted)
    _, ladj = f(torch.zeros(3, dtype=torch.float64))
    assert_close(ladj, torch.linalg.slogdet(wanted).logabsdet)


def test_reflections_are_as_many_as_asked_for_or_as_a_rotation_needs():
    for size, needed in ((2, 2), (5, 4), (6, 6)):
        for make, turns, others in (
            (Householder, 1, 0),
            (QR, 1, size * (size + 1) // 2),
            (SVD, 2, size),
        ):
            for count, given in ((needed, None), (3, 3), (1, 1)):
                f = make(size, given)
                assert f.n_params == others + turns * count * (size - 1)


def test_a_bias_is_added_if_it_is_asked_for():
    z = torch.zeros(2, 3)
    for make in (Diagonal, Triangular, Householder, Full, PLU, LowRank):
        for bias in (True, False):
            f = shaken_as_it_is(make(3, bias=bias))
            assert len(f.raw()) == f.n_params + 3 * bias
            assert bool(f(z)[0].any()) == bias


def test_a_permutation_is_saved():
    one = Permutation(4, torch.tensor([2, 0, 3, 1]))
    other = Permutation(4, torch.arange(4))
    other.load_state_dict(one.state_dict())
    z = torch.randn(3, 4)
    assert torch.equal(other(z)[0], z[:, [2, 0, 3, 1]])
    assert torch.equal(other.inverse(other(z)[0])[0], z)


def test_low_rank_obeys_the_determinant_lemma():
    f = shaken(LowRank(6, 2, bias=False))
    a, scale = matrix(f), f.raw()[:6].asinh().exp()
    update = a / scale - torch.eye(6)
    assert torch.linalg.matrix_rank(update) == 2
    assert_close(
        f(torch.zeros(6).double())[1], torch.linalg.slogdet(a).logabsdet
    )


@pytest.mark.parametrize("make", [*full_rank.values(), Diagonal, Cayley])
def test_an_image_is_mapped_pixel_by_pixel(make):
    torch.manual_seed(0)
    pixel = shaken(make(3))
    torch.manual_seed(0)
    image = shaken(make((3, 2, 4)))
    z = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    x, ladj = image(z)
    rows, each = pixel(z.movedim(1, -1))
    assert_close(x, rows.movedim(-1, 1))
    assert_close(ladj, each.sum((-2, -1)))


@pytest.mark.parametrize("make", full_rank.values(), ids=full_rank)
def test_full_rank_maps_reach_the_gaussian_optimum(make):
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64) + torch.eye(4)
    covariance = root @ root.T
    mean = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    flow = Flow(make(4)).double()
    # A quadratic log-density has the same mean over these 8 points as over the
    # Gaussian.
    sides = 2.0 * torch.linalg.cholesky(covariance).T
    x = mean + torch.cat([sides, -sides])
    entropy = torch.distributions.MultivariateNormal(mean, covariance).entropy()
    optimizer = torch.optim.LBFGS(
        flow.parameters(),
        max_iter=500,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        nll = -flow.log_prob(x).mean()
        nll.backward()
        return nll

    optimizer.step(loss)
    assert abs(loss() - entropy) < 1e-3


def test_a_fixed_permutation_limits_plu_and_qr_is_not_limited():
    """Fit the map itself, at a quarter turn, where the leading minor vanishes, and beyond."""
    for degrees in (90.0, 120.0):
        angle = torch.tensor(degrees).deg2rad().double()
        turn = torch.stack(
            [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
        ).view(2, 2)
        misfit = {}
        for name, make in {"qr": QR, "plu": PLU}.items():
            torch.manual_seed(0)
            f = make(2, bias=False).double()
            optimizer = torch.optim.LBFGS(
                f.parameters(), max_iter=200, line_search_fn="strong_wolfe"
            )

            def loss():
                optimizer.zero_grad()
                value = (f(torch.eye(2).double())[0].T - turn).square().sum()
                value.backward()
                return value

            optimizer.step(loss)
            misfit[name] = (
                loss().item(),
                max(p.abs().max().item() for p in f.parameters()),
            )
        assert misfit["qr"][0] < 1e-8 and misfit["qr"][1] < 10
        assert (
            misfit["plu"][0] > angle.cos().square() - 1e-9
            and misfit["plu"][1] > 1e3
        )


def test_autocast_leaves_the_precision_alone():
    f = PLU(4)
    z = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        x, ladj = f(z)
        back, _ = f.inverse(x)
    assert x.dtype == ladj.dtype == back.dtype == torch.float32
    assert_close(back, z)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Permutation(3, torch.tensor([0, 1, 1])), r"order: expected each of 0 to 2 once, got \[0, 1, 1\]"),
        (lambda: Permutation(3, torch.tensor([1, 0])), r"order: expected each of 0 to 2 once, got \[1, 0\]"),
        (lambda: Permutation(3, torch.tensor([0, 1, 3])), "order: expected each of 0 to 2 once"),
        (lambda: Permutation(3, [-1, 0, 1]), "order: expected each of 0 to 2 once"),
        (lambda: PLU(3, torch.tensor([1, 0])), "order: expected each of 0 to 2 once"),
        (lambda: Householder(1), "event_shape: .* at least 2"),
        (lambda: LowRank(3, 4), "rank: expected 1 to 3, got 4"),
        (lambda: Diagonal(0), "event_shape: "),
        (lambda: Diagonal(None), "event_shape: "),
        (lambda: Diagonal(3, start=torch.zeros(4)), r"start: .* shape \(3,\), got tensor"),
        (lambda: Full(3, start=torch.zeros(3, 3)), r"start: .* shape \(9,\)"),
        (lambda: Cayley(3, start=[0.0, 0.0, 0.0]), r"start: .* tensor of shape \(3,\), got \[0.0"),
        (lambda: Cayley(3, start=torch.arange(3)), "start: expected a floating-point tensor"),
        (lambda: Diagonal(2, start=torch.tensor([0.0, math.inf])), "start: expected finite numbers"),
    ],
)  # fmt: skip
def test_constructors_name_what_is_wrong(make, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        make()


KINDS = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "array turned round": lambda order: np.array(order[::-1])[::-1],
    "array of int32": partial(np.array, dtype=np.int32),
    "list of numpy's": lambda order: [np.int16(i) for i in order],
    "list of torch's": lambda order: [torch.tensor(i) for i in order],
} | {
    str(dtype): partial(torch.tensor, dtype=dtype)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", [Permutation, PLU])
def test_an_order_is_read_from_whole_numbers_of_any_format(kind, make):
    order = [2, 0, 3, 1]
    f, z = make(4, kind(order)), torch.randn(5, 4)
    assert torch.equal(f(z)[0], z[:, order])
    assert torch.equal(f.inverse(f(z)[0])[0], z)
    wanted = make(4, torch.tensor(order)).state_dict()
    assert_close(f.state_dict(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "order",
    [
        torch.tensor([2.0, 0.0, 1.0]),
        np.array([2.0, 0.0, 1.0]),
        [True, False, 2],
        torch.ones(3, dtype=torch.bool),
        torch.tensor([[0, 1, 2]]),
        torch.tensor(0),
        torch.arange(3, device="meta"),
        "210",
        None,
        3,
        torch.nn.Linear,
    ],
    ids=repr,
)
def test_an_order_of_another_kind_is_refused(order):
    with pytest.raises(
        ValueError, match="^order: expected each of 0 to 2 once"
    ):
        Permutation(3, order)


INTEGERS = {
    "reflections": (partial(Householder, 5), partial(QR, 5), partial(SVD, 5)),
    "rank": (partial(LowRank, 5),),
    "event_shape": (Diagonal, Triangular, Householder, Cayley, Full, LowRank),
    "context_dim": (partial(Diagonal, 5), partial(Householder, 5)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_sizes_are_whole_numbers_of_any_kind(name):
    for make in INTEGERS[name]:
        for bad in ("a", 3.0, True, -1, math.nan, torch.zeros(2, 2), object()):
            with pytest.raises(ValueError, match=f"^{name}: "):
                make(**{name: bad})
        for good in (np.int64(3), np.uint8(3), torch.tensor(3)):
            same = make(**{name: good}), make(**{name: 3})
            assert repr(same[0]) == repr(same[1])
            shapes = [[p.shape for p in f.parameters()] for f in same]
            assert shapes[0] == shapes[1]
    for make in INTEGERS["reflections"]:
        with pytest.raises(ValueError, match="^reflections: "):
            make(reflections=0)


FLAGS = {
    "bias": Diagonal,
    "upper": Triangular,
    "orthogonal": MatrixExponential,
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name):
    make = partial(FLAGS[name], 3)
    for bad in ("no", 2, 0, None, torch.zeros(3)):
        with pytest.raises(
            ValueError, match=f"^{name}: expected True or False"
        ):
            make(**{name: bad})
    assert repr(make(**{name: np.True_})) == repr(make(**{name: True}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_of_one_matrix_is_as_exact_as_that_of_two(dtype):
    f = MatrixExponential(2, orthogonal=True).to(dtype)
    z = torch.tensor([1.0, 0.0], dtype=dtype)
    for angle in (1e-3, 0.01, 0.04, 0.3, 0.5, 2.0):  # around torch's switches
        with torch.no_grad():
            # entries are shared out: divided by the root of the size
            next(f.parameters())[0] = math.sinh(angle * 2**0.5)
        x = f(z)[0].abs().double()
        true = torch.tensor(
            [math.cos(angle), math.sin(angle)], dtype=torch.float64
        ).abs()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x, true, rtol=0, atol=30 * eps)
