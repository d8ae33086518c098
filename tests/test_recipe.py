"""The settings of a run, its optimisers and schedules, and what is said of wrong ones."""

import dataclasses
import json
import math
import re
import typing

import numpy as np
import pytest
import torch
import tyro
from train_child import (
    X,
    affine,
    assert_same,
    log_target,
    make_data,
    make_flow,
    run_likelihood,
)

from flowcourse.bases import DiagonalGaussian
from flowcourse.batches import _ORDER, _generator
from flowcourse.checkpoint import load_checkpoint
from flowcourse.core import Flow
from flowcourse.objectives import MaximumLikelihood, ReverseKL
from flowcourse.recipe import OPTIMIZERS, Recipe, learning_rate_factor
from flowcourse.trainer import fit


def test_a_recipe_is_what_the_keywords_say():
    recipe = Recipe(steps=5, lr=1e-2, schedule="cosine", ema=0.9)
    options = dict(steps=5, lr=1e-2, schedule="cosine", ema=0.9)

    def run(*recipe, **settings):
        flow = make_flow()
        objective = MaximumLikelihood(flow)
        x = make_data()[0]
        return flow, fit(objective, x, *recipe, progress=False, **settings)

    want = run(**options)
    assert_same(run(recipe), want)
    assert_same(run(Recipe(steps=9, lr=1e-2), **options), want)
    assert recipe.steps == 5  # frozen, and not changed by a call
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.steps = 6
    assert dataclasses.replace(recipe, steps=np.int64(6)).steps == 6


def test_a_recipe_is_plain_and_documented():
    settings = [f.name for f in dataclasses.fields(Recipe)]
    assert len(settings) == 14
    words = set(re.findall("`([a-z_]+)`", fit.__doc__))
    assert set(settings) <= words  # help(fit) names them all
    hints = typing.get_type_hints(Recipe)
    assert list(typing.get_args(hints["optimizer"])) == list(OPTIMIZERS)
    assert json.loads(json.dumps(Recipe().to_dict())) == Recipe().to_dict()
    own = Recipe(optimizer=torch.optim.Adagrad)
    assert own.to_dict()["optimizer"] == "Adagrad"
    # as the command line reads it
    assert tyro.cli(Recipe, args=["--clip", "3"]) == Recipe(clip=3.0)


def test_numbers_become_pythons_own():
    recipe = Recipe(
        steps=np.int64(3), seed=np.uint8(200), lr=np.float32(0.5), clip=1
    )
    for name, kind in (
        ("steps", int),
        ("seed", int),
        ("lr", float),
        ("clip", float),
    ):
        assert type(getattr(recipe, name)) is kind


WRONG_SETTINGS = [
    dict(steps=True),
    dict(steps=np.float64(3)),
    dict(steps=None),
    dict(epochs=0),
    dict(batch_size="8"),
    dict(patience=0),
    dict(validate_every=-1),
    dict(warmup=-1),
    dict(seed=2**64),
    dict(seed=None),
    dict(lr=math.inf),
    dict(lr=0),
    dict(lr="1e-3"),
    dict(lr=np.float64("nan")),
    dict(weight_decay=math.inf),
    dict(weight_decay=math.nan),
    dict(weight_decay=-1e-9),
    dict(clip=math.inf),
    dict(clip=math.nan),
    dict(clip=0.0),
    dict(ema=-0.1),
    dict(ema=math.nan),
    dict(schedule=["cosine"]),
    dict(schedule=None),
    dict(amp=True),
    dict(optimizer=None),
    dict(optimizer=["adam"]),
]


@pytest.mark.parametrize("wrong", WRONG_SETTINGS, ids=str)
def test_wrong_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        Recipe(**wrong)


def test_unknown_arguments_are_answered_with_those_that_exist():
    objective = MaximumLikelihood(make_flow())
    for wrong, meant in (
        ("stpes", "steps"),
        ("batchsize", "batch_size"),
        ("callback", "callbacks"),
        ("learning_rate", None),
    ):
        hint = f"; did you mean {meant}" if meant else ". It takes steps"
        with pytest.raises(
            ValueError, match=f"{wrong}: fit has no such argument{hint}"
        ):
            fit(objective, X, **{wrong: 1})
    with pytest.raises(ValueError, match="recipe: expected a Recipe, got dict"):
        fit(objective, X, {"steps": 3})


def test_schedule():
    assert [learning_rate_factor(k, 10) for k in (0, 9)] == [1.0, 1.0]
    assert [learning_rate_factor(k, 10, warmup=3) for k in range(4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]
    assert learning_rate_factor(5, 10, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(10, 10, "cosine") == pytest.approx(0.0)
    history = run_likelihood()[1]
    assert history.lr[5] == 1e-2 and history.lr[-1] < 1e-4


def test_own_optimizer_and_trainable_base():
    flow = Flow(make_flow().bijection, DiagonalGaussian(2))
    before = flow.base.loc.clone()
    fit(
        ReverseKL(flow, log_target),
        steps=3,
        optimizer=torch.optim.RMSprop,
        progress=False,
    )
    assert not torch.equal(flow.base.loc, before)


BY_NAME = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": lambda p, **options: torch.optim.RMSprop(
        p, momentum=0.9, **options
    ),
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_by_name_are_torchs(name):
    x, options = make_data(20)[0], dict(lr=1e-2, weight_decay=0.3)
    flow, other = affine(), affine()
    objective = MaximumLikelihood(flow)
    fit(objective, x, steps=3, optimizer=name, progress=False, **options)
    optimizer = BY_NAME[name](other.parameters(), **options)
    for epoch in range(3):
        order = torch.randperm(20, generator=_generator(0, _ORDER, epoch))
        optimizer.zero_grad()
        (-other.log_prob(x[order]).mean()).backward()
        optimizer.step()
    for p, q in zip(flow.parameters(), other.parameters(), strict=True):
        # fused kernels round in another order: a few of the last digits
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_each_group_keeps_its_share_of_the_rate():
    flow = Flow(affine().bijection, DiagonalGaussian(2))

    def halves(params, lr, weight_decay):
        base = list(flow.base.parameters())
        rest = [p for p in params if all(p is not q for q in base)]
        groups = [dict(params=rest), dict(params=base, lr=0.0)]
        return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)

    before = [p.clone() for p in flow.parameters()]
    options = dict(steps=3, optimizer=halves, warmup=2, progress=False)
    history = fit(MaximumLikelihood(flow), make_data()[0], **options)
    assert history.lr == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    base = {id(p) for p in flow.base.parameters()}
    for p, q in zip(flow.parameters(), before, strict=True):
        assert torch.equal(p, q) == (id(p) in base)


def test_epochs_and_fractions_count_rows(tmp_path):
    path = tmp_path / "run.pt"
    x = make_data(55)[0]
    options = dict(validation=0.5, epochs=2, batch_size=5, progress=False)
    history = fit(MaximumLikelihood(affine()), x, checkpoint=path, **options)
    # 27.5 rows are held out, rounded to 28; the other 27 make 6 batches
    assert load_checkpoint(path)["recipe"]["validation"].startswith("(28, 2)")
    assert len(history) == 12 and history.validation_step == [6, 12]
