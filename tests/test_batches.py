"""Order and noise as functions of the seed and the step, weights of rows, and wrong data."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from train_child import (
    Blurred,
    Breaks,
    StopAt,
    X,
    affine,
    assert_same,
    make_data,
    make_flow,
    press,
    run_likelihood,
    run_reverse,
)

from flowcourse.batches import _NOISE, _ORDER, _SPLIT, _generator, _stream
from flowcourse.checkpoint import CheckpointError
from flowcourse.objectives import MaximumLikelihood, Objective
from flowcourse.trainer import TrainingInterrupted, fit


def test_draws_inside_the_objective_resume_too(tmp_path):
    class Noisy(Objective):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(
                nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)
            )

        def forward(self, batch, noise=None):
            return (
                (self.layer(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            )

    def run(**options):
        torch.manual_seed(0)
        objective = Noisy()
        return objective, fit(
            objective, make_data()[0], steps=20, progress=False, **options
        )

    want, path = run(), tmp_path / "run.pt"
    with pytest.raises(TrainingInterrupted):
        run(checkpoint=path, callbacks=(StopAt(7, press),))
    assert_same(run(checkpoint=path, resume=True), want)


def test_draws_inside_the_objective_are_fresh_in_each_step():
    class Draws(Breaks):
        def __init__(self):
            super().__init__(99)
            self.drawn = []

        def forward(self, batch, noise=None):
            self.drawn.append(torch.rand(()).item())
            return super().forward(batch)

    first, again, other = Draws(), Draws(), Draws()
    for objective, seed in ((first, 0), (again, 0), (other, 1)):
        fit(objective, steps=5, seed=seed, progress=False)
    assert len(set(first.drawn + other.drawn)) == 10
    assert first.drawn == again.drawn


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    want = torch.randn(3)
    torch.manual_seed(5)
    run_reverse(steps=2)
    assert torch.equal(torch.randn(3), want)
    assert run_reverse(steps=3)[1] == run_reverse(steps=3)[1]
    assert run_reverse(steps=3)[1] != run_reverse(steps=3, seed=1)[1]


def test_noise_is_fresh_in_each_step_and_the_same_in_each_validation():
    class Recorded(Blurred):
        drawn = []

        def draw(self, n, generator):
            self.drawn.append(super().draw(n, generator))
            return self.drawn[-1]

    x = make_data(1700)[0]
    objective = Recorded(make_flow())
    options = dict(steps=4, batch_size=17, validate_every=2, progress=False)
    fit(objective, x[:200], validation=x[200:], **options)
    sizes = [len(noise) for noise in objective.drawn]
    assert sizes == [17, 17, 1000, 500, 17, 17, 1000, 500]
    d = objective.drawn
    assert torch.equal(d[2], d[6]) and torch.equal(d[3], d[7])
    starts = [tuple(d[k][0].tolist()) for k in (0, 1, 2, 3, 4, 5)]
    assert len(set(starts)) == 6
    # each use of randomness has a stream of its own
    assert len({_stream(0, k) for k in (_ORDER, _NOISE, _SPLIT)}) == 3


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_large_seeds(tmp_path, seed):
    path = tmp_path / "run.pt"
    want = run_likelihood(steps=3, seed=seed, checkpoint=path)
    options = dict(steps=3, seed=seed, checkpoint=path, resume=True)
    assert_same(run_likelihood(**options), want)


def test_data_with_a_graph_are_only_read():
    scale = torch.ones(2, requires_grad=True)
    x = make_data(50)[0] * scale
    fit(
        MaximumLikelihood(affine()),
        x,
        validation=x,
        steps=3,
        weights=torch.ones(50, requires_grad=True),
        progress=False,
    )
    assert scale.grad is None


def test_a_fraction_of_numpy_is_a_fraction():
    options = dict(steps=4)
    assert_same(
        run_likelihood(validation=np.float64(0.2), **options),
        run_likelihood(validation=0.2, **options),
    )


COUNTS = torch.arange(40) % 4  # some rows count three times, some not at all


def run_weighted(x, weights=None, **options):
    """Full batches of float64, with plain steps: what rounding leaves is small."""
    flow = make_flow().double()
    options = {"steps": 20, "batch_size": 200, "optimizer": "sgd", **options}
    objective = MaximumLikelihood(flow)
    return flow, fit(
        objective, x, weights=weights, lr=1e-2, progress=False, **options
    )


def assert_close_runs(got, want):
    # sums in another order: the rounding of float64, a hundredfold for 20 steps
    close = dict(rtol=1e-12, atol=1e-12)
    for name in ("loss", "gradient_norm", "validation_loss"):
        a, b = (torch.tensor(getattr(run[1], name)) for run in (got, want))
        torch.testing.assert_close(a, b, **close)
    for p, q in zip(got[0].parameters(), want[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)


@pytest.mark.parametrize("scale", [1, 0.37])
def test_a_weight_is_a_number_of_copies(scale):
    x, y = make_data(80)[0].double().split(40)
    copies = [rows.repeat_interleave(COUNTS, 0) for rows in (x, y)]
    want = run_weighted(copies[0], validation=copies[1])
    got = run_weighted(x, (COUNTS * scale, COUNTS * scale), validation=y)
    assert_close_runs(got, want)
    alone = run_weighted(x, COUNTS * scale, validation=y)  # y counts alike
    assert alone[1].loss == got[1].loss
    assert alone[1].validation_loss != got[1].validation_loss


def test_rows_without_weight_are_not_looked_at():
    x = make_data(40)[0].double()
    far = x.clone()
    far[COUNTS == 0] = 1e200  # its density is zero
    want = run_weighted(x, COUNTS)
    assert_close_runs(run_weighted(far, COUNTS), want)


def test_held_out_rows_take_their_weights_along():
    # in batches of 1000, of which the last is small
    x = make_data(3000)[0].double()
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    flow, history = run_weighted(
        x, weights, validation=0.4, steps=1, validate_every=1
    )
    order = torch.randperm(3000, generator=_generator(0, _SPLIT, 0))[:1200]
    with torch.no_grad():
        each = -flow.log_prob(x[order])
    w = weights[order].double()
    want = ((w * each).sum() / w.sum()).item()
    assert history.validation_loss == [pytest.approx(want, rel=1e-13)]
    assert abs(want - each.mean()) > 1e-4


def test_small_batches_are_right_in_the_mean():
    x = make_data(40)[0].double()
    weights = 1.0 + COUNTS
    # with so small a rate the weights stay, to the last bit
    options = dict(steps=10, batch_size=4, optimizer="sgd", progress=False)
    flow = make_flow().double()
    history = fit(
        MaximumLikelihood(flow), x, weights=weights, lr=1e-300, **options
    )
    with torch.no_grad():
        each = -flow.log_prob(x)
    want = (weights * each).sum() / weights.sum()
    assert np.mean(history.loss) == pytest.approx(want.item(), rel=1e-13)


def test_weights_resume_and_are_compared(tmp_path):
    x, path = make_data(40)[0].double(), tmp_path / "run.pt"
    want = run_weighted(x, COUNTS, batch_size=7)
    stop = dict(checkpoint=path, callbacks=(StopAt(9, press),), batch_size=7)
    with pytest.raises(TrainingInterrupted):
        run_weighted(x, COUNTS, **stop)
    again = dict(checkpoint=path, resume=True, batch_size=7)
    assert_same(run_weighted(x, COUNTS, **again), want)
    with pytest.raises(CheckpointError, match="made with weights = .*crc32"):
        run_weighted(x, (COUNTS > 0) * (1.0 + COUNTS), **again)


def test_a_run_without_weights_is_not_one_with_them(tmp_path):
    x, path = make_data(40)[0].double(), tmp_path / "run.pt"
    run_weighted(x, checkpoint=path)
    with pytest.raises(CheckpointError, match="weights = 'none', but"):
        run_weighted(
            x, 1.0 + COUNTS, checkpoint=path, resume=True, batch_size=200
        )
    path = tmp_path / "with.pt"
    run_weighted(x, 1.0 + COUNTS, checkpoint=path)
    with pytest.raises(CheckpointError, match="weights = .*crc32.* has 'none'"):
        run_weighted(x, checkpoint=path, resume=True)


WRONG_WEIGHTS = [
    (torch.ones(3), r"weights: expected one for each row, shape \(4,\), got"),
    (torch.ones(4, 1), r"weights: expected one for each row, shape \(4,\)"),
    (torch.tensor([1.0, -1, 1, 1]), "weights: expected numbers of at least 0"),
    (torch.tensor([1.0, math.nan, 1, 1]), "weights: expected finite numbers"),
    (torch.tensor([1.0, math.inf, 1, 1]), "weights: expected finite numbers"),
    (torch.zeros(4), "weights: expected one above 0 .* only zeros"),
    ([1.0] * 4, "weights: expected a tensor, got list; torch.as_tensor makes"),
    ((torch.ones(4), torch.ones(4)), "weights: expected one tensor, or a pair"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS, ids=str)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(make_flow()), X, weights=weights, progress=False)


def test_weights_need_one_loss_for_each_row():
    with pytest.raises(
        ValueError, match="weights: .*Blurred defines forward and not losses"
    ):
        fit(Blurred(make_flow()), X, weights=torch.ones(4), progress=False)
    with pytest.raises(
        ValueError, match="weights: expected None, because there is no data"
    ):
        run_reverse(weights=torch.ones(4))

    class Sum(MaximumLikelihood):
        def losses(self, batch, noise=None):
            return super().losses(batch).sum()

    with pytest.raises(
        ValueError, match=r"Sum.losses .* 4 rows, got shape \(\)"
    ):
        fit(Sum(make_flow()), X, weights=torch.ones(4), progress=False)
    with pytest.raises(NotImplementedError, match="neither losses nor forward"):
        Objective()(X)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return X[k]


WRONG_DATA = [
    (np.zeros((4, 2)), "data: expected a tensor, got ndarray; torch.as_tensor"),
    ([X, X], "data: expected a tensor, got list; several tensors go into a"),
    (Rows(), "data: .* got Rows; fit draws the batches itself"),
    (
        torch.utils.data.DataLoader(Rows()),
        "got DataLoader; fit draws the batch",
    ),
    ((), r"data: expected at least one tensor, got \(\)"),
    ((X,), "data: expected x or the pair .* got tuple of 1"),
    ((X, X, X), "got tuple of 3"),
    ((X, None), r"data\[1\]: expected a tensor, got NoneType"),
    (None, "data: expected x or the pair .* got NoneType"),
    (X.to("meta"), "data: expected a dense tensor .* on the meta device"),
    (X.to_sparse(), "data: expected a dense tensor .* of layout torch.sparse"),
    (torch.zeros(4, 2, dtype=torch.int64), "floating-point .* torch.int64"),
    (torch.zeros(4, 2, dtype=torch.bool), "floating-point .* torch.bool"),
    (torch.zeros(4), "x: .* last dimension 2"),
    (torch.tensor(1.0), r"data: expected at least one row, got shape \(\)"),
]


@pytest.mark.parametrize(
    ("data", "message"), WRONG_DATA, ids=[m for _, m in WRONG_DATA]
)
def test_wrong_data_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        fit(MaximumLikelihood(make_flow()), data, steps=1, progress=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_rows_of_different_lengths_are_named():
    nested = torch.nested.nested_tensor([X, X[:2]])
    with pytest.raises(ValueError, match="data: .* got one that is nested"):
        fit(MaximumLikelihood(make_flow()), nested, progress=False)
