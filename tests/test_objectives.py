"""What is minimised: annealing, path gradients, and what is refused."""

import pytest
import torch
from torch import nn
from train_child import (
    StopAt,
    X,
    affine,
    assert_same,
    fail,
    log_target,
    make_flow,
    run_reverse,
)

from flowcourse.bases import DiagonalGaussian, GaussianMixture
from flowcourse.batches import _NOISE, _generator
from flowcourse.core import Flow
from flowcourse.objectives import (
    Annealing,
    MaximumLikelihood,
    ReverseKL,
)
from flowcourse.recipe import learning_rate_factor
from flowcourse.trainer import fit


def test_annealing_counts_updates_and_resumes(tmp_path):
    def run(**options):
        flow = make_flow()
        objective = ReverseKL(flow, log_target, Annealing(0.0, 20))
        history = fit(
            objective,
            steps=12,
            batch_size=33,
            lr=1e-2,
            progress=False,
            **options,
        )
        assert objective.annealing.done == len(history)
        return flow, history

    path, want = tmp_path / "run.pt", run()
    with pytest.raises(RuntimeError, match="power cut"):
        run(checkpoint=path, checkpoint_every=4, callbacks=(StopAt(7, fail),))
    assert_same(run(checkpoint=path, resume=True), want)
    assert want[1].loss != run_reverse()[1].loss  # the weight matters

    with pytest.raises(ValueError, match="start: expected .* at most 1, got 2"):
        Annealing(2)
    with pytest.raises(
        ValueError, match="updates: expected .* at least 1, got 0"
    ):
        Annealing(updates=0)


def test_a_run_that_goes_on_takes_the_gradient_that_it_began_with(tmp_path):
    def run(path, resume, steps):
        objective = ReverseKL(make_flow(), log_target, path=path)
        fit(
            objective,
            steps=steps,
            batch_size=8,
            progress=False,
            checkpoint=tmp_path / "run.pt",
            resume=resume,
        )

    run(True, False, 2)
    with pytest.raises(ValueError, match="path=True"):
        run(False, True, 4)
    run(True, True, 4)


def test_annealing_weighs_the_target_and_is_1_in_eval_mode():
    flow = make_flow().double()
    objective = ReverseKL(flow, log_target, Annealing(0.25, 8))
    noise = objective.draw(50, _generator(0, _NOISE, 0))
    x, log_q = flow.rsample_and_log_prob(noise=noise)
    for weight in (0.25, 0.375, 0.5):  # 1/4, and 1/8 more each time
        want = (log_q - weight * log_target(x)).mean()
        assert objective(None, noise) == want
    objective.eval()
    assert objective(None, noise) == (log_q - log_target(x)).mean()
    assert objective.annealing.done == 3
    weights = Annealing(0.5, 2)
    assert [weights().item() for _ in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_the_path_gradient_leaves_the_density_alone():
    """By hand for `x = m + s z`: of the gradient of log q(x) only the way through x is left."""
    flow = affine().double()
    noise = torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 2)
    objective = ReverseKL(flow, log_target, path=True)
    objective(None, noise).backward()
    got = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    x = flow.rsample_and_log_prob(noise=noise)[0]
    other = affine().double()
    other.load_state_dict(flow.state_dict())
    other.requires_grad_(False)
    (other.log_prob(x) - log_target(x)).mean().backward()
    for p, g in zip(flow.parameters(), got, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-14)
    flow.zero_grad()
    ReverseKL(flow, log_target)(None, noise).backward()
    assert any(
        (p.grad - g).abs().max() > 1e-3
        for p, g in zip(flow.parameters(), got, strict=True)
    )


def test_wrong_objectives_are_named():
    with pytest.raises(
        ValueError, match="objective: expected an Objective.*got Flow"
    ):
        fit(make_flow(), X)
    with pytest.raises(
        ValueError, match=r"such as Flow\(bijection\), got RealNVP"
    ):
        MaximumLikelihood(make_flow().bijection)
    with pytest.raises(
        ValueError, match="whose draws carry gradients, got GaussianMixture"
    ):
        ReverseKL(
            Flow(make_flow().bijection, GaussianMixture(X[:2])), log_target
        )
    with pytest.raises(
        ValueError, match="objective: expected parameters to train"
    ):
        fit(MaximumLikelihood(make_flow().requires_grad_(False)), X)
    with pytest.raises(
        ValueError, match="epochs: expected None, because there is no data"
    ):
        fit(ReverseKL(make_flow(), log_target), epochs=3)


def test_classes_in_the_place_of_instances_are_named():
    with pytest.raises(ValueError, match="got the class MaximumLikelihood"):
        fit(MaximumLikelihood, X)
    with pytest.raises(ValueError, match="flow: .* got the class Flow"):
        MaximumLikelihood(Flow)
    with pytest.raises(ValueError, match="flow: .* got the class Flow"):
        ReverseKL(Flow, log_target)
    with pytest.raises(ValueError, match="got the class DiagonalGaussian"):
        ReverseKL(make_flow(), DiagonalGaussian)
    with pytest.raises(ValueError, match="annealing: .* got float"):
        ReverseKL(make_flow(), log_target, 0.5)
    with pytest.raises(ValueError, match="schedule: expected one of"):
        learning_rate_factor(1, 10, "linear")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x: -x.square().sum(),
            r"shape \(33,\), got shape \(\); sum over",
        ),
        (lambda x: -x.square(), r"got shape \(33, 2\)"),
        (lambda x: -x.square().sum(-1, True), r"got shape \(33, 1\)"),
        (lambda x: 0.0, "got float"),
        (lambda x: None, "got NoneType"),
    ],
)
def test_a_target_gives_one_number_for_each_draw(wrong, message):
    objective = ReverseKL(make_flow(), wrong)
    with pytest.raises(
        ValueError, match=f"log_target: expected one number .*{message}"
    ):
        fit(objective, batch_size=33, progress=False)


def test_a_density_gives_one_number_for_each_row():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def log_prob(self, x, context=None):
            return -(x - self.loc).square().sum()

    with pytest.raises(
        ValueError, match=r"flow: expected log_prob .* 4 rows, got shape \(\)"
    ):
        fit(MaximumLikelihood(Summed()), X, progress=False)
