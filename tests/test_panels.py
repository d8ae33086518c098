"""What the panels draw, number by number, and what they refuse."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from flowcourse.history import History
from flowcourse.panels import layer_profile, progress_panel, ratio_panel
from flowcourse.plots import COLORS


@pytest.fixture(autouse=True)
def nothing_is_shown(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("show was called")

    monkeypatch.setattr(plt, "show", refuse)
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture
def pair():
    return Figure().subplots(2, 1)


def normal(n, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, **options)


def stairs(ax):
    """Values, edges and baselines of what was drawn on an `Axes`, in order."""
    return [patch.get_data() for patch in ax.patches]


def color(artist):
    return to_hex(artist.get_edgecolor()).upper()


# --- histograms and ratios ---


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("bins", [7, [-2.0, -1.0, -0.5, 0.5, 3.0]])
def test_densities_and_ratios_are_those_of_numpy(pair, bins, log):
    """Samples of different sizes, with rows beyond the edges that count all the same."""
    x, y = normal(1000), 1.5 * normal(300, 1) + 0.2
    window = {} if isinstance(bins, list) else {"low": -2, "high": 3}
    axes = ratio_panel(
        {"data": x, "model": y},
        axes=pair,
        bins=bins,
        log=log,
        label="$x$ [mm]",
        **window,
    )
    assert list(axes) == list(pair)
    edges = np.linspace(-2, 3, 8) if isinstance(bins, int) else np.array(bins)
    (n, m), width = (np.histogram(t, edges)[0] for t in (x, y)), np.diff(edges)
    assert n.sum() < 1000 and m.sum() < 300 and n.all()
    band, data, model = stairs(pair[0])
    np.testing.assert_allclose(data.values, n / 1000 / width)
    np.testing.assert_allclose(model.values, m / 300 / width)
    np.testing.assert_allclose(
        band.values, (n + np.sqrt(n)) / 1000 / width, rtol=1e-12
    )
    np.testing.assert_allclose(
        band.baseline, (n - np.sqrt(n)) / 1000 / width, rtol=1e-12
    )
    band, ratio = stairs(pair[1])
    np.testing.assert_allclose(ratio.values, (m / 300) / (n / 1000))
    np.testing.assert_allclose(band.values, 1 + 1 / np.sqrt(n))
    np.testing.assert_allclose(band.baseline, 1 - 1 / np.sqrt(n))
    for drawn in (*stairs(pair[0]), *stairs(pair[1])):
        np.testing.assert_allclose(drawn.edges, edges)
    assert pair[0].get_yscale() == ("log" if log else "linear")
    assert pair[1].get_yscale() == "linear" and pair[1].get_ylim() == (0.5, 1.5)
    assert pair[1].get_xlabel() == "$x$ [mm]"
    assert pair[1].get_ylabel() == "ratio to data"
    assert pair[1].get_xlim() == (edges[0], edges[-1])


def test_the_window_is_that_of_the_reference(pair):
    x, y = normal(500), 10 * normal(500, 1)
    ratio_panel({"model": y, "truth": x}, "truth", pair, bins=5)
    edges = stairs(pair[0])[1].edges
    assert (edges[0], edges[-1]) == (x.min().item(), x.max().item())
    wanted = np.histogram(x.double(), 5)[0] / 500 / np.diff(edges)
    np.testing.assert_allclose(stairs(pair[0])[2].values, wanted)
    # all rows of the reference are within, the largest among them
    assert wanted @ np.diff(edges) == pytest.approx(1)


def test_an_empty_bin_has_no_ratio_and_no_band(pair):
    x = torch.tensor([0.5, 0.5, 2.5])
    y = torch.tensor([0.5, 1.5, 3.5, 3.5])
    ratio_panel({"data": x, "model": y}, axes=pair, bins=[0, 1, 2, 3, 4])
    band, ratio = stairs(pair[1])
    nan = np.nan
    np.testing.assert_allclose(ratio.values, [3 / 8, nan, 0, nan])
    np.testing.assert_allclose(band.values, [1 + 2**-0.5, nan, 2, nan])
    np.testing.assert_allclose(band.baseline, [1 - 2**-0.5, nan, 0, nan])
    np.testing.assert_allclose(stairs(pair[0])[1].values, [2 / 3, 0, 1 / 3, 0])
    np.testing.assert_allclose(stairs(pair[0])[2].values, [0.25, 0.25, 0, 0.5])
    pair[0].figure.draw_without_rendering()


@pytest.mark.parametrize("log", [False, True])
def test_one_row_is_drawn(pair, log):
    one = torch.tensor([3.0])
    ratio_panel({"data": one, "model": one}, axes=pair, bins=1, log=log)
    band, data, _ = stairs(pair[0])
    assert data.edges.tolist() == [2.5, 3.5] and data.values == 1.0
    assert (band.baseline, band.values) == (0.0, 2.0)
    assert stairs(pair[1])[1].values == 1.0
    pair[0].figure.draw_without_rendering()


def test_rows_that_are_not_finite_are_counted(pair):
    y = normal(100)
    y[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    samples = {"data": normal(100, 1), "model": y}
    ratio_panel(samples, axes=pair, bins=4, low=-9, high=9)
    counts = np.histogram(y[3:], np.linspace(-9, 9, 5))[0]
    wanted = counts / 100 / 4.5  # a share of all rows, the broken ones too
    np.testing.assert_allclose(stairs(pair[0])[2].values, wanted)
    texts = [text.get_text() for text in pair[0].get_legend().get_texts()]
    assert texts == ["data", "model (3 not finite)"]
    # a reference needs edges then
    swapped = {"data": y, "model": samples["data"]}
    with pytest.raises(ValueError, match=r"samples\['data'\]: .* got 3 that"):
        ratio_panel(swapped, axes=pair)
    ratio_panel(swapped, axes=pair, low=-1, high=1)
    ratio_panel(swapped, axes=pair, bins=[-1, 1])


def test_colours_are_roles_and_lines_tell_samples_apart(pair):
    x = normal(50)
    names = ["data", "one", "two", "base", "Gaussian"]
    ratio_panel(
        dict.fromkeys(names, x), axes=pair, roles={"Gaussian": "neutral"}
    )
    wanted = ["data", "model", "model", "base", "neutral"]
    drawn = pair[0].patches[1:]
    assert [color(patch) for patch in drawn] == [COLORS[w] for w in wanted]
    lines = [patch.get_linestyle() for patch in drawn]
    assert len(set(lines[:4])) == 4
    # each has the same look below
    below = pair[1].patches[1:]
    assert [color(p) for p in below] == [COLORS[w] for w in wanted[1:]]
    assert [p.get_linestyle() for p in below] == lines[1:]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": {}}, "^samples: expected tensors by name"),
        ({"samples": torch.ones(3)}, "^samples: .*got Tensor"),
        ({"samples": {"data": [1.0]}}, r"^samples\['data'\]: .*got list"),
        (
            {"samples": {"data": torch.ones(3, 2)}},
            r"\['data'\]: expected shape",
        ),
        ({"samples": {"data": torch.ones(0)}}, r"\['data'\]: expected shape"),
        ({"reference": "date"}, "^reference: expected one of 'data', 'model'"),
        ({"bins": 0}, "^bins: expected a whole number of at least 1"),
        ({"bins": [1.0]}, "^bins: expected rising edges"),
        ({"bins": [1.0, 1.0]}, "^bins: expected rising edges"),
        ({"low": 3, "high": 2}, "^high: expected at least low = 3, got 2"),
        ({"low": float("nan")}, "^low: expected a finite number"),
        ({"ratios": (2, 1)}, "^ratios: expected two rising numbers"),
        ({"roles": {"date": "base"}}, "^roles: expected one of"),
        ({"roles": {"data": "truth"}}, r"^roles\['data'\]: expected one of"),
        ({"axes": "here"}, "^axes: expected 2 Axes, for histograms"),
    ],
)
def test_a_ratio_of_something_else_is_refused(change, told):
    plain = {"samples": {"data": normal(9), "model": normal(9, 1)}}
    with pytest.raises(ValueError, match=told):
        ratio_panel(**(plain | change))
    assert not plt.get_fignums()  # no figure was made


def test_a_ratio_makes_its_axes():
    x = torch.arange(10)  # whole numbers will do
    upper, lower = ratio_panel({"data": x, "model": x.double()})
    assert upper.figure is lower.figure and len(plt.get_fignums()) == 1
    above, below = upper.get_position(), lower.get_position()
    assert above.y0 > below.y1 and above.height > 2 * below.height
    assert upper.get_shared_x_axes().joined(upper, lower)


# --- layers ---


def bands(ax):
    """The lower and the upper end of each band, layer by layer."""
    found = []
    for band in ax.collections:
        points = band.get_paths()[0].vertices
        layers = np.unique(points[:, 0])
        ends = [points[points[:, 0] == layer, 1] for layer in layers]
        found.append(np.array([(end.min(), end.max()) for end in ends]).T)
    return found


@pytest.mark.parametrize("log", [False, True])
def test_a_profile_has_means_and_quantiles(ax, log):
    x, y = normal((200, 5)).exp(), 2 * normal((31, 5), 1).exp()
    found = layer_profile(
        {"data": x, "model": y},
        ax,
        bands=(0.9, 0.5),
        first=3,
        log=log,
        label="energy [MeV]",
    )
    assert found is ax and len(ax.get_lines()) == 2
    drawn = bands(ax)
    for k, (rows, line) in enumerate(zip((x, y), ax.get_lines())):
        assert line.get_xdata().tolist() == [3, 4, 5, 6, 7]
        mean = rows.double().mean(0)
        np.testing.assert_allclose(line.get_ydata(), mean, rtol=1e-12)
        for (low, high), ends in zip(((25, 75), (5, 95)), drawn[2 * k :]):
            wanted = np.percentile(rows.double(), (low, high), axis=0)
            np.testing.assert_allclose(ends, wanted, rtol=1e-12)
    assert ax.get_yscale() == ("log" if log else "linear")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "energy [MeV]")
    assert [line.get_color() for line in ax.get_lines()] == [
        COLORS["data"],
        COLORS["model"],
    ]
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 2


def test_a_profile_of_one_row_is_that_row(ax):
    row = torch.tensor([[1.0, 4.0, 2.0]])
    layer_profile({"data": row}, ax, bands=(0, 0.5, 1))
    assert ax.get_lines()[0].get_ydata().tolist() == [1, 4, 2]
    for ends in bands(ax):
        assert ends.tolist() == [[1, 4, 2]] * 2
    layer_profile({"data": torch.ones(4, 1)}, ax)  # and one layer


def test_a_profile_is_drawn_on_the_current_axes():
    ax = plt.subplots()[1]
    x = normal((6, 2)).requires_grad_()
    assert layer_profile({"here": x}, roles={"here": "base"}) is ax
    assert ax.get_lines()[0].get_color() == COLORS["base"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": {"data": torch.ones(3)}}, r"\['data'\]: expected shape"),
        (
            {"samples": {"a": torch.ones(2, 3), "b": torch.ones(2, 4)}},
            "^samples: expected as many layers in each, got {'a': 3, 'b': 4}",
        ),
        (
            {"samples": {"a": torch.tensor([[1.0, torch.nan], [1.0, 2.0]])}},
            r"^samples\['a'\]: expected finite numbers, got 1 rows",
        ),
        ({"bands": (1.5,)}, "^bands: expected a finite number .*at most 1"),
        ({"first": 0.5}, "^first: expected a whole number"),
    ],
)
def test_a_profile_of_something_else_is_refused(change, told):
    plain = {"samples": {"data": torch.ones(3, 2)}}
    with pytest.raises(ValueError, match=told):
        layer_profile(**(plain | change))
    assert not plt.get_fignums()


# --- a training ---


def training(**changes):
    plain = {
        "loss": [3.0, 2.0, float("nan"), 1.5],
        "gradient_norm": [1.0, 0.1, 0.2, float("inf")],
        "validation_step": [2, 4],
        "validation_loss": [1.8, 1.9],
    }
    return History(**(plain | changes))


def test_a_training_is_drawn_series_by_series():
    tracked = {
        "max parameter": [0.1, 0.2, 0.3, 0.4],
        "sliced W": ([2, 4], torch.tensor([0.5, 0.25])),
    }
    axes = progress_panel(training(), tracked, log=("sliced W",))
    assert len(axes) == 4
    labels = ["loss [nat]", "gradient norm", "max parameter", "sliced W"]
    assert [ax.get_ylabel() for ax in axes] == labels
    assert [ax.get_xlabel() for ax in axes] == ["step"] * 4
    assert {ax.get_xscale() for ax in axes} == {"log"}
    scales = ["linear", "linear", "linear", "log"]
    assert [ax.get_yscale() for ax in axes] == scales
    nan = np.nan
    wanted = [
        ([1, 2, 3, 4], [3, 2, nan, 1.5]),
        ([1, 2, 3, 4], [1, 0.1, 0.2, nan]),
        ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4]),
        ([2, 4], [0.5, 0.25]),
    ]
    for ax, (steps, values) in zip(axes, wanted):
        line = ax.get_lines()[0]
        np.testing.assert_allclose(line.get_xdata(), steps)
        np.testing.assert_allclose(line.get_ydata(), values)
        assert line.get_color() == COLORS["model"]
        # the step of the best validation
        (best,) = (x for x in ax.get_lines() if x.get_label() == "best step")
        assert best.get_xdata() == [2, 2]
    # what is not finite has a cross at the foot
    crosses = [
        [x for x in ax.get_lines() if x.get_marker() == "x"] for ax in axes
    ]
    steps = [[list(line.get_xdata()) for line in found] for found in crosses]
    assert steps == [[[3]], [[4]], [], []]
    ((cross,), *_) = crosses
    assert cross.get_transform() == axes[0].get_xaxis_transform()
    assert 0 < cross.get_ydata() < 0.1
    (dots,) = (x for x in axes[0].get_lines() if x.get_label() == "validation")
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == (
        [2, 4],
        [1.8, 1.9],
    )
    assert not any(
        line.get_label() == "validation"
        for ax in axes[1:]
        for line in ax.get_lines()
    )
    axes[0].figure.draw_without_rendering()


def test_the_gradient_norm_stands_on_a_logarithmic_axis():
    axes = progress_panel(training())
    assert [ax.get_yscale() for ax in axes] == ["linear", "log"]


def test_without_a_finite_validation_nothing_is_marked():
    for steps, losses in (([], []), ([2], [float("nan")])):
        history = training(validation_step=steps, validation_loss=losses)
        for ax in progress_panel(history):
            assert "best step" not in [x.get_label() for x in ax.get_lines()]


def test_one_step_is_seen():
    history = History(loss=[1.0], gradient_norm=[2.0])
    for ax in progress_panel(history):
        assert ax.get_lines()[0].get_marker() == "."


def test_two_trainings_share_their_axes():
    given = Figure().subplots(2, 2)
    tracked = {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}
    axes = progress_panel(training(), tracked, given, label="one")
    again = progress_panel(
        training(), tracked, axes, label="two", role="base", linestyle="--"
    )
    assert list(again) == list(given.ravel())
    lines = axes[2].get_lines()
    one, two = (line for line in lines if line.get_label() in ("one", "two"))
    assert two.get_color() == COLORS["base"] and two.get_linestyle() == "--"
    assert one.get_color() == COLORS["model"]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5])
def test_at_most_three_panels_stand_in_a_row(n):
    axes = progress_panel(training(), {str(k): [1.0] * 4 for k in range(n)})
    figure = axes[0].figure
    assert len(axes) == len(figure.axes) == n + 2
    figure.draw_without_rendering()
    places = [round(ax.get_position().y0, 3) for ax in axes]
    assert max(places.count(place) for place in places) <= 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"history": [1.0]}, "^history: expected what fit gave"),
        ({"history": History()}, "^history: expected one step or more"),
        ({"tracked": {"loss": [1.0] * 4}}, "^tracked: .* its own 'loss'"),
        ({"tracked": {"a": [1.0]}}, r"^tracked\['a'\]: .* each of 4 steps"),
        ({"tracked": {"a": ([0, 1], [1.0, 2.0])}}, "from 1 on"),
        ({"tracked": {"a": ([1, 2], [1.0])}}, r"got shapes \(2,\) and \(1,\)"),
        ({"log": ("a",)}, "^log: expected one of 'loss', 'gradient norm'"),
        ({"role": "a"}, "^role: expected one of"),
        ({"axes": [1, 2]}, "^axes: expected 2 Axes, one for each series"),
    ],
)
def test_a_training_of_something_else_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        progress_panel(**({"history": training()} | change))
    assert not plt.get_fignums()
