"""A promise is one class: one of your own is run and reported like those of the contract."""

import pytest
import torch
from torch import nn

from flowcourse.core import Bijection
from flowcourse.probes import Broken, Measure, Pass, Promise
from flowcourse.promises import PROMISES
from flowcourse.testing import ContractError, check_bijection

z = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))


class Scale(Bijection):
    """`x = z exp(s)`."""

    def __init__(self):
        super().__init__(2)
        self.s = nn.Parameter(torch.zeros(2))

    def _forward(self, z, context):
        return z * self.s.exp(), self.s.sum().expand(z.shape[:-1])

    def _inverse(self, x, context):
        return x * (-self.s).exp(), -self.s.sum().expand(x.shape[:-1])


class KeepsVolume(Promise):
    """Both `ladj` are zero."""

    name = "volume"
    meaning = "volumes are kept"
    tolerance = (1e-12, 1e-6)

    def run(self, case):
        """Both directions."""
        for p in case.passes:
            yield Measure(
                f"ladj of {p.way} against 0",
                p.ladj.detach().abs(),
                self.allowed(case),
                case.judged(p.way),
                p.where,
            )


class Grows(Promise):
    """Each number grows with its own input."""

    name = "growth"
    meaning = "each number grows with its input"

    def run(self, case):
        """Forward, where the slopes can be seen."""
        slopes = case.forward.jacobian.diagonal(dim1=1, dim2=2)
        if (slopes <= 0).any():
            raise Broken("a slope is not positive", case.forward.where(0))
        yield Measure("slopes", torch.zeros(len(slopes)))


class Crashes(Promise):
    """Judged like any other."""

    name, meaning = "crash", "it runs"

    def run(self, case):
        """Not at all."""
        raise KeyError("lost")


def test_the_contract_has_each_promise_once_and_shape_first():
    assert list(PROMISES) == [promise.name for promise in PROMISES.values()]
    assert next(iter(PROMISES)) == "shape"
    assert [p.name for p in PROMISES.values() if p.essential] == ["shape"]
    for promise in PROMISES.values():
        assert promise.meaning and len(promise.tolerance) == 2


def test_a_promise_of_your_own_is_judged_after_the_others():
    report = check_bijection(Scale(), z, also=[Grows()])
    assert [row[0] for row in report.rows()] == [
        "worst error",
        *PROMISES,
        "growth",
    ]
    own = [f for f in report.findings if f.promise == "growth"]
    assert len(own) == 6 and all(f.ok and f.judged == 12 for f in own)
    assert "growth" in repr(report) and "| growth |" in report._repr_markdown_()
    assert "growth" not in repr(check_bijection(Scale(), z))


def test_a_promise_of_your_own_that_breaks_is_named_with_its_meaning():
    with pytest.raises(ContractError) as caught:
        check_bijection(Scale(), z, also=[KeepsVolume()])
    message = str(caught.value)
    assert "volume (volumes are kept)" in message
    assert "ladj of forward against 0: off by" in message
    assert "where 1e-12 is allowed" in message and "at z = [" in message
    broken = caught.value.report.broken
    assert {f.promise for f in broken} == {"volume"}
    # as made the scale is one; float32 has a tolerance of its own
    assert {f.level for f in broken} == {1.0, 3.0}
    assert {f.tolerance for f in broken} == {1e-12, 1e-6}


def test_a_promise_of_your_own_may_fail_outright():
    with pytest.raises(ContractError, match="crash .it runs.\n *KeyError"):
        check_bijection(Scale(), z, also=[Crashes()])

    class Turned(Scale):
        def _forward(self, z, context):
            x, ladj = super()._forward(z, context)
            return -x, ladj

        def _inverse(self, x, context):
            return super()._inverse(-x, context)

    exempt = {"identity": "it turns"}
    with pytest.raises(ContractError, match="a slope is not positive") as e:
        check_bijection(Turned(), z, also=[Grows()], exempt=exempt)
    assert {f.promise for f in e.value.report.broken} == {"growth"}


def test_a_promise_of_your_own_may_be_exempt():
    report = check_bijection(
        Scale(), z, also=[KeepsVolume()], exempt={"volume": "it scales"}
    )
    assert "exempt: volume, because it scales" in repr(report)


def test_a_promise_without_a_way_to_run_says_so():
    class Empty(Promise):
        name, meaning = "empty", "nothing"

    with pytest.raises(ContractError, match="Empty defines no run"):
        check_bijection(Scale(), z, also=[Empty()])


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ([Grows], r"also: .* got <class .*; give Grows\(\)"),
        (["growth"], "also: expected objects .* got 'growth'"),
        ([Promise()], "also: Promise needs a name in words"),
        ([Grows(), Grows()], "also: there is a promise 'growth' already"),
        ([PROMISES["ladj"]], "also: there is a promise 'ladj' already"),
    ],
)
def test_what_is_no_new_promise_is_refused(also, message):
    with pytest.raises(ValueError, match=message):
        check_bijection(Scale(), z, also=also)


class Cube(Bijection):
    """Flat at zero, where its inverse has no slope."""

    def __init__(self):
        super().__init__(1)

    def _forward(self, z, context):
        return z**3, (3 * z.square()).log().sum(-1)

    def _inverse(self, x, context):
        z = x.sign() * x.abs() ** (1 / 3)
        return z, -(3 * z.square()).log().sum(-1)


def test_the_spread_of_rounding_sees_beyond_a_slope():
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    rows = torch.arange(2)
    found = Pass(Cube(), "inverse", x, None).spread("out", rows, 1e-15)
    assert 1e-6 < found[0] < 1e-4 and 1e-16 < found[1] < 1e-14


def test_the_spread_of_rounding_is_not_what_other_rows_do():
    class Shifted(Cube):
        def _forward(self, z, context):
            return z + z.mean(), torch.zeros(len(z))

    z = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    p = Pass(Shifted(), "forward", z, None)
    assert (p.spread("out", torch.tensor([1]), 1e-15) < 1e-13).all()
