"""Another experiment is not gone on from."""

import numpy as np
import pytest
import torch
from train_child import (
    FULL,
    Breaks,
    assert_same,
    log_target,
    make_data,
    make_flow,
    run_likelihood,
    run_reverse,
)

from flowcourse.checkpoint import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from flowcourse.core import Flow
from flowcourse.objectives import Annealing, MaximumLikelihood, ReverseKL
from flowcourse.trainer import fit


def test_numbers_of_numpy_make_a_checkpoint_that_can_be_read(tmp_path):
    path = tmp_path / "run.pt"
    options = dict(
        steps=np.int64(6),
        batch_size=np.int32(33),
        lr=np.float64(1e-2),
        clip=np.float32(2.0),
        ema=np.float64(0.9),
        weight_decay=torch.tensor(0.0),
        seed=np.uint8(3),
    )
    want = run_reverse(**options, checkpoint=path)
    recipe = load_checkpoint(path)["recipe"]
    for name in options:
        assert type(recipe[name]) in (int, float), name
    plain = {name: value.item() for name, value in options.items()}
    assert_same(run_reverse(**plain, checkpoint=path, resume=True), want)


def test_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run_reverse(steps=3, checkpoint=path)
    with pytest.raises(ValueError, match="exists; resume=True"):
        run_reverse(steps=3, checkpoint=path)
    with pytest.raises(
        CheckpointError, match="lr = 0.01, but this run has 0.5"
    ):
        run_reverse(steps=3, checkpoint=path, resume=True, lr=0.5)
    with pytest.raises(
        CheckpointError, match="of another experiment: objective"
    ):
        fit(
            ReverseKL(Flow(nn_free()), log_target),
            steps=3,
            batch_size=33,
            lr=1e-2,
            checkpoint=path,
            resume=True,
            progress=False,
        )
    save_checkpoint(tmp_path / "model.pt", {"objective": {}})
    with pytest.raises(CheckpointError, match="no run to go on with, but obj"):
        run_reverse(steps=3, checkpoint=tmp_path / "model.pt", resume=True)
    path = tmp_path / "data.pt"
    run_likelihood(steps=2, checkpoint=path)
    flow = make_flow(context_dim=1)
    x, context = make_data()
    options = {**FULL, "steps": 2, "checkpoint": path, "resume": True}
    for k in range(2):
        parts = x.clone(), context.clone()
        parts[k][3] += 1e-3
        with pytest.raises(CheckpointError, match="data = .*crc32"):
            fit(MaximumLikelihood(flow), parts, **options)


def nn_free():
    from flowcourse.coupling import RealNVP

    return RealNVP(2, layers=4, hidden=(16,))


def test_another_experiment_with_the_same_shapes_is_refused(tmp_path):
    path = tmp_path / "run.pt"

    def run(start=0.0, **options):
        objective = ReverseKL(make_flow(), log_target, Annealing(start, 20))
        return fit(objective, steps=3, progress=False, **options)

    identity = {"flow": {"layers": (2, 3), "bend": None}, "name": "a"}
    run(checkpoint=path, identity=identity)
    again = dict(checkpoint=path, resume=True)
    assert len(run(**again, identity=identity)) == 3
    # what one of the two does not say is not compared
    assert len(run(**again)) == len(run(**again, identity={"more": 1})) == 3
    with pytest.raises(
        CheckpointError,
        match="another experiment: flow.layers = .2, 3., but this run has .2, 4.; "
        "flow.bend = None, but this run has 1$",
    ):
        changed = {"flow": {"layers": [2, 4], "bend": 1}, "name": "a"}
        run(**again, identity=changed)
    with pytest.raises(
        CheckpointError,
        match="objective = .*start=0, .*but this run has .*start=0.5, ",
    ):
        run(0.5, **again)
    # another release may word it in another way
    old = load_checkpoint(path)
    old["versions"]["flowcourse"] = "0.0.1"
    save_checkpoint(path, old)
    with pytest.warns(UserWarning, match="objective = .*start=0"):
        assert len(run(0.5, **again)) == 3
    # and earlier ones said nothing
    del old["identity"]
    save_checkpoint(path, old)
    assert len(run(0.5, **again, identity=changed)) == 3


def test_where_a_function_lies_is_no_difference(tmp_path):
    class Shown(Breaks):
        def extra_repr(self):
            return repr(lambda: None)

    path = tmp_path / "run.pt"
    kept = []  # two that live at once lie at two addresses
    for resume in (False, True):
        kept.append(Shown(99))
        kept.append(object())
        fit(kept[-2], steps=2, checkpoint=path, resume=resume, progress=False)
