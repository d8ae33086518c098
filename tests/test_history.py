"""What a run leaves: the best validation, files, pictures."""

import json
import math

import pytest
from train_child import run_likelihood

from flowcourse.history import History


@pytest.mark.parametrize(
    ("losses", "best", "lowest", "stale"),
    [
        ([2.0, math.nan, 1.0], 3, 1.0, 0),
        ([2.0, math.nan], 1, 2.0, 1),
        ([2.0, -math.inf, math.inf, 1.5, 3.0], 4, 1.5, 1),
        ([math.nan, 2.0, 2.0], 2, 2.0, 1),
        ([math.nan, math.inf], None, None, 2),
        ([math.inf, -math.inf], None, None, 2),
        ([], None, None, 0),
    ],
)
def test_a_validation_that_is_not_finite_never_wins(
    losses, best, lowest, stale
):
    steps = list(range(1, len(losses) + 1))
    history = History(loss=[1.0], validation_loss=losses, validation_step=steps)
    assert history.best_step == best
    assert history.best_validation == lowest
    assert history.stale == stale
    assert ("best validation" in repr(history)) == (best is not None)


def test_a_history_with_numbers_that_are_not_finite_is_json(tmp_path):
    path = tmp_path / "history.json"
    numbers = [1.0, math.nan, math.inf, -math.inf]
    history = History(
        loss=numbers, gradient_norm=numbers[::-1], validation_step=[1, 2]
    )
    history.save(path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    again = History.load(path)
    assert repr(again.to_dict()) == repr(history.to_dict())
    # as earlier releases wrote it
    path.write_text(json.dumps(history.to_dict()))
    assert repr(History.load(path).to_dict()) == repr(history.to_dict())


def keep_largest(step, objective, history):
    largest = max(p.max().item() for p in objective.parameters())
    history.tracked.setdefault("largest", []).append(largest)


def test_what_callbacks_keep_is_part_of_the_history(tmp_path):
    """One that was cut and goes on has kept what one has that was not."""
    settings = dict(callbacks=(keep_largest,), checkpoint_every=1)
    whole = run_likelihood(steps=6, **settings)[1]
    assert len(whole.tracked["largest"]) == 6
    path = tmp_path / "run.pt"

    def stop(step, objective, history):
        if step == 4:
            raise KeyboardInterrupt

    cut = settings | dict(callbacks=(keep_largest, stop), checkpoint=path)
    with pytest.raises(KeyboardInterrupt):
        run_likelihood(steps=6, **cut)
    again = run_likelihood(steps=6, checkpoint=path, resume=True, **settings)[1]
    assert again == whole and again.tracked == whole.tracked
    again.tracked["other"] = [math.nan]
    again.save(tmp_path / "history.json")
    loaded = History.load(tmp_path / "history.json")
    assert loaded.tracked["largest"] == whole.tracked["largest"]
    assert math.isnan(loaded.tracked["other"][0])
    assert History(tracked={"a": [1.0]}) != History(tracked={"a": [2.0]})


def test_history_is_tidy(tmp_path, capsys):
    history = run_likelihood(steps=10)[1]
    assert len(history) == 10 and all(
        len(v) == 10 for v in list(history.to_dict().values())[:4]
    )
    assert history.validation_step == [7, 10] and history.best_step in (7, 10)
    assert len(history.seconds) == 10 and min(history.seconds) > 0
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    assert repr(history).startswith("History(10 steps, loss ")
    assert repr(History()) == "History(0 steps)" and History().best_step is None
    axes = history.plot()
    assert (
        axes[0].get_ylabel() == "loss [nat]" and axes[1].get_yscale() == "log"
    )
    run_likelihood(steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "grad=" in shown
    run_likelihood(steps=3)
    assert not capsys.readouterr().err
