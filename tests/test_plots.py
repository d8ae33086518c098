"""What the figures show, number by number, and what they refuse."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from flowcourse.elementwise import AffineMap, Elementwise
from flowcourse.plots import (
    COLORS,
    MARKERS,
    density2d,
    grid2d,
    grid_points,
    scatter2d,
    show_images,
    use_style,
)
from flowcourse.toy_densities import toys


@pytest.fixture
def ax():
    return Figure().subplots()


def test_grid_points_are_the_centres_of_cells():
    points = grid_points((0, 10), (4, 14), 2, torch.float64)
    assert points.dtype == torch.float64
    # rows go up the second coordinate
    assert points.tolist() == [
        [[1, 11], [3, 11]],
        [[1, 13], [3, 13]],
    ]
    same = grid_points(np.float32(-1), torch.tensor(1.0), np.int64(4))
    assert torch.equal(same, grid_points(-1.0, 1.0, 4))
    assert same[0, :, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert torch.equal(
        grid_points(np.zeros(2), torch.ones(2), 1)[0, 0] * 2, torch.ones(2)
    )


def test_a_density_stands_upright_in_its_window(ax):
    def log_prob(x):  # highest where the second coordinate is
        return x[:, 1] + 0.1 * x[:, 0]

    assert density2d(log_prob, ax, (-1, 2), (3, 4), 3, batch=2) is ax
    image = ax.images[-1]
    assert image.get_extent() == [-1, 3, 2, 4]
    assert image.origin == "lower" and ax.get_aspect() == 1
    points = grid_points((-1, 2), (3, 4), 3)
    expected = log_prob(points.reshape(-1, 2)).exp().reshape(3, 3)
    np.testing.assert_allclose(image.get_array(), expected.numpy(), rtol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_1$", "$x_2$")


@pytest.mark.parametrize("role", COLORS)
def test_clouds_have_the_look_of_their_role(ax, role):
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True)
    assert scatter2d(points, ax, role, label="cloud", zorder=7) is ax
    (cloud,) = ax.collections
    assert cloud.get_offsets().tolist() == points.tolist()
    assert mpl.colors.to_hex(cloud.get_facecolor()[0]).upper() == COLORS[role]
    assert (cloud.get_label(), cloud.get_zorder()) == ("cloud", 7)
    letter = "z" if role == "base" else "x"
    assert (
        ax.get_xlabel() == f"${letter}_1$" and len(set(MARKERS.values())) == 4
    )
    for n, size in ((10, 16), (300, 10), (10_000, 2)):
        scatter2d(torch.zeros(n, 2), ax, role)
        assert ax.collections[-1].get_sizes() == pytest.approx(size)
    scatter2d(torch.zeros(0, 2), ax)


def test_a_grid_is_drawn_where_the_map_puts_it(ax):
    shift = Elementwise(2, AffineMap())
    with torch.no_grad():
        for p in shift.parameters():
            p.fill_(0.5)
    for f in (shift, lambda z: 2 * z):
        ax.clear()
        assert grid2d(f, ax, -1, 3, lines=2, role="data") is ax
        x = f(torch.tensor([[-1.0, -1.0], [3.0, 3.0], [-1.0, 3.0]]))
        low, high, corner = (x[0] if isinstance(x, tuple) else x).tolist()
        assert len(ax.lines) == 4
        up, right = ax.lines[0].get_xydata(), ax.lines[2].get_xydata()
        assert up.shape == (241, 2) and ax.lines[0].get_linestyle() == "-"
        np.testing.assert_allclose(up[[0, -1]], [low, corner], atol=1e-6)
        assert ax.lines[2].get_linestyle() == "--"
        across = [low, [high[0], low[1]]]  # both maps keep the axes apart
        np.testing.assert_allclose(right[[0, -1]], across, atol=1e-6)
        np.testing.assert_allclose(
            ax.lines[3].get_xydata()[-1], high, atol=1e-6
        )


def test_images_are_tiled_in_reading_order(ax):
    images = torch.arange(1, 6).reshape(5, 1, 1).expand(5, 2, 3)
    assert show_images(images.to(torch.uint8), ax, nrow=3) is ax
    picture = ax.images[-1].get_array().filled(0)
    # two rows of three tiles, each in a frame one pixel wide
    assert picture.shape == (2 * 4, 3 * 5)
    tiles = picture.reshape(2, 4, 3, 5)
    for k in range(6):
        tile = tiles[k // 3, :, k % 3]
        inside = tile[1:-1, 1:-1]
        assert (inside == (k + 1 if k < 5 else 0)).all(), k
        assert tile.sum() == inside.sum()
    assert ax.images[-1].get_cmap().name == "Greys" and not ax.axison
    colour = torch.rand(2, 3, 4, 4)
    show_images(colour, ax, nrow=10)
    picture = ax.images[-1].get_array()
    assert picture.shape == (6, 12, 3)
    np.testing.assert_array_equal(
        picture[1:-1, 7:-1], colour[1].permute(1, 2, 0).numpy()
    )
    assert (picture[0] == 1).all()  # white


def test_a_default_device_does_not_reach_the_figures(ax):
    points, images = torch.zeros(5, 2), torch.ones(5, 2, 2)
    with torch.device("meta"):
        scatter2d(points, ax)
        show_images(images, ax)
        density2d(toys["moons"].log_prob, ax, bins=3, device="cpu")
        grid2d(lambda z: z, ax, device="cpu")
    assert ax.images[0].get_array().max() == 1


def test_the_style_has_a_line_for_each_colour():
    with mpl.rc_context():
        use_style()
        cycle = list(mpl.rcParams["axes.prop_cycle"])
    assert [c["color"] for c in cycle] == list(COLORS.values())
    assert len({c["linestyle"] for c in cycle}) == 4


LOG_PROB = toys["rings"].log_prob


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda ax: scatter2d(torch.zeros(5, 3), ax), "points"),
        (lambda ax: scatter2d([[0.0, 0.0]], ax), "points"),
        (lambda ax: scatter2d(torch.zeros(5, 2), ax, "prior"), "role"),
        (lambda ax: scatter2d(torch.zeros(5, 2), ax, ["data"]), "role"),
        (lambda ax: grid_points(0, 0), "high"),
        (lambda ax: grid_points((0, 1), (1, 1)), "high"),
        (lambda ax: grid_points(-math.inf, 0), "low"),
        (lambda ax: grid_points(0, math.nan), "high"),
        (lambda ax: grid_points((0, 0, 0), 1), "low"),
        (lambda ax: grid_points("0", 1), "low"),
        (lambda ax: grid_points(bins=0), "bins"),
        (lambda ax: grid_points(bins=2.0), "bins"),
        (lambda ax: density2d(LOG_PROB, ax, bins=-1), "bins"),
        (lambda ax: density2d(LOG_PROB, ax, batch=0), "batch"),
        (lambda ax: density2d("rings", ax), "log_prob"),
        (lambda ax: density2d(lambda x: LOG_PROB(x).sum(), ax), "log_prob"),
        (lambda ax: density2d(lambda x: x, ax), "log_prob"),
        (lambda ax: density2d(lambda x: None, ax), "log_prob"),
        (lambda ax: grid2d(None, ax), "bijection"),
        (lambda ax: grid2d(lambda z: z[:, 0], ax), "bijection"),
        (lambda ax: grid2d(lambda z: 1.0, ax), "bijection"),
        (lambda ax: grid2d(lambda z: z, ax, low=2), "high"),
        (lambda ax: grid2d(lambda z: z, ax, high=math.inf), "high"),
        (lambda ax: grid2d(lambda z: z, ax, lines=0), "lines"),
        (lambda ax: show_images(torch.zeros(5, 64), ax), "images"),
        (lambda ax: show_images(torch.zeros(0, 8, 8), ax), "images"),
        (lambda ax: show_images(torch.zeros(2, 0, 8), ax), "images"),
        (lambda ax: show_images(np.zeros((2, 8, 8)), ax), "images"),
        (lambda ax: show_images(torch.zeros(2, 2, 8, 8), ax), "images"),
        (lambda ax: show_images(torch.zeros(2, 8, 8), ax, nrow=0), "nrow"),
        (lambda ax: show_images(torch.zeros(2, 8, 8), ax, nrow=2.0), "nrow"),
    ],
)  # fmt: skip
def test_mistakes_are_named(ax, call, text):
    with pytest.raises(ValueError, match=f"^{text}: "):
        call(ax)
