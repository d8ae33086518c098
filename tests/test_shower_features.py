"""Features of showers, masks and names of runs, against numbers made by hand."""

import pytest
import torch
from helpers import showers_by_hand
from torch.testing import assert_close

from flowcourse.shower_features import (
    EXACT,
    FEATURES,
    SETS,
    RunName,
    code_of,
    features,
    from_features,
    inputs_of,
    without,
)

# --- features ---


def test_features_stand_in_their_order():
    showers = showers_by_hand()
    x = features(showers)
    assert x.shape == (500, 65) and len(FEATURES) == 65
    assert_close(x[:, 0], showers.clusters.sum(-1))
    assert_close(x[:, 1], showers.deposits.sum(-1))
    assert torch.equal(x[:, 2:5], showers.cog)
    assert torch.equal(x[:, 5:35], showers.clusters)
    assert torch.equal(x[:, 35:], showers.deposits)
    names = {i: FEATURES[i] for i in (0, 1, 4, 5, 34, 35, 64)}
    assert names == {
        0: "total clusters",
        1: "total energy",
        4: "cog z",
        5: "clusters 1",
        34: "clusters 30",
        35: "energy 1",
        64: "energy 30",
    }
    again = from_features(showers.energy, x)
    for part in ("energy", "clusters", "deposits", "cog"):
        assert torch.equal(getattr(again, part), getattr(showers, part))
    with pytest.raises(ValueError, match="^x: expected"):
        from_features(showers.energy, x[:, :64])


def test_three_features_follow_from_the_others():
    """Two of them leave a correlation matrix without two of its dimensions."""
    x = features(showers_by_hand())
    for name, of_others in EXACT.items():
        assert_close(of_others(x), x[:, FEATURES.index(name)])
    assert [FEATURES.index(name) for name in EXACT] == [0, 1, 4]
    spectrum = torch.linalg.eigvalsh(torch.corrcoef(x.T))
    assert (spectrum[:2].abs() < 1e-10).all() and spectrum[2] > 1e-4


# --- masks ---


@pytest.mark.parametrize(
    ("dropped", "code"),
    [
        ((), 36893488147419103231),
        ((0, 1, 4), 8070450532247928831),
        ((0, 1, 2, 3, 4), 1152921504606846975),
        ((*range(64),), 1),
        ((*range(1, 65),), 2**64),
    ],
)
def test_a_mask_is_a_number_of_65_digits(dropped, code):
    mask = without(*dropped)
    assert code_of(mask) == code and inputs_of(code) == mask
    assert code_of(list(mask)) == code_of(torch.tensor(mask)) == code
    assert [i for i, used in enumerate(mask) if not used] == [*dropped]


def test_any_mask_comes_back():
    for mask in (
        torch.rand(200, 65, generator=torch.Generator().manual_seed(0)) < 0.5
    ).tolist():
        assert inputs_of(code_of(mask)) == tuple(mask)
    assert {size: sum(mask) for size, mask in SETS.items()} == {
        size: size for size in (65, 62, 60)
    }


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: without(65), "^dropped: expected numbers up to 64"),
        (lambda: without(-1), "^dropped: expected a whole number"),
        (lambda: code_of([True] * 64), "^inputs: expected 65 truth values"),
        (lambda: code_of([1] * 65), "^inputs: expected True or False"),
        (lambda: code_of([False] * 65), "^inputs: expected 65 .*not all"),
        (lambda: code_of(5), "^inputs: expected 65 truth values.*got 5"),
        (lambda: inputs_of(0), "^code: expected .* at least 1, got 0"),
        (lambda: inputs_of(2**65), r"^code: expected less than 2\^65"),
        (lambda: SETS[61], "^name: expected one of 65, 62, 60, got 61"),
    ],
)
def test_what_is_no_mask_is_refused(made, told):
    with pytest.raises(ValueError, match=told):
        made()


# --- names of runs ---

CODE = 8070450532247928831
NAMES = [
    (
        dict(version="alt1", num_blocks=2, inputs=SETS[62], fnorms=True),
        f"ShowerFlow_alt1_nb2_inputs{CODE}_fnorms_best",
        "alt1_nb2_fnorms_wo[0, 1, 4]",
    ),
    (
        dict(version="original", num_blocks=10, saved="latest"),
        "ShowerFlow_original_nb10_inputs36893488147419103231_latest",
        "original_nb10",
    ),
    (
        dict(
            version="alt1",
            num_blocks=2,
            inputs=SETS[60],
            fnorms=True,
            tbase=True,
            dhist=True,
            weight_decay=1e-4,
            tag="try_2",
            saved=100,
        ),
        (
            "ShowerFlow_alt1_nb2_inputs1152921504606846975_fnorms_tbase_dhist"
            "_wd1p0e-04_try_2_0000100"
        ),
        "alt1_nb2_fnorms_tbase_dhist_wd1p0e-04_try_2_wo[0, 1, 2, 3, 4]",
    ),
    (
        dict(version="log1", num_blocks=1, weight_decay=0.1, tag="best"),
        "ShowerFlow_log1_nb1_inputs36893488147419103231_wd1p0e-01_best_best",
        "log1_nb1_wd1p0e-01_best",
    ),
]


@pytest.mark.parametrize(("settings", "name", "short"), NAMES)
def test_a_run_is_called_as_the_original_calls_it(settings, name, short):
    run = RunName(**settings)
    assert str(run) == name and run.short == short
    assert RunName.parse(name) == run
    assert hash(RunName.parse(name)) == hash(run)


@pytest.mark.parametrize("flags", range(8))
@pytest.mark.parametrize("decay", [0.0, 1e-4, 2.5e-3, 1e-10])
@pytest.mark.parametrize("tag", ["", "a", "x_y.z-1", "latest"])
@pytest.mark.parametrize("saved", ["best", "latest", 0, 9_999_999])
def test_names_come_back(flags, decay, tag, saved):
    on = [bool(flags & bit) for bit in (1, 2, 4)]
    run = RunName("alt2", 4, SETS[60], *on, decay, tag, saved)
    assert RunName.parse(str(run)) == run


@pytest.mark.parametrize(
    "settings",
    [
        dict(tag="fnorms"),
        dict(tag="tbase_1"),
        dict(tag="wd1p0e-04"),
        dict(weight_decay=1.25e-4),
        dict(version="alt_1"),
        dict(version="ALT1"),
        dict(version=""),
        dict(saved="worst"),
        dict(saved=10_000_000),
        dict(saved=-1),
        dict(num_blocks=0),
        dict(weight_decay=-1.0),
        dict(inputs=(True,) * 64),
    ],
)
def test_what_a_name_cannot_tell_apart_is_refused(settings):
    with pytest.raises(
        ValueError, match=rf"^.*{next(iter(settings))}.*: expected"
    ):
        RunName(**{"version": "alt1", "num_blocks": 2} | settings)


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "alt1_nb2_inputs1_best",
        "ShowerFlow_alt1_nb2_inputs1",
        "ShowerFlow_alt1_nb02_inputs1_best",
        "ShowerFlow_alt1_nb2_inputs1_100",
        "ShowerFlow_alt1_nb2_inputs1_best.pth",
    ],
)
def test_what_is_no_name_is_refused(text):
    with pytest.raises(ValueError, match="^text: expected ShowerFlow_VERSION"):
        RunName.parse(text)
