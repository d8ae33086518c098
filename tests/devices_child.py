"""Make and run the zoo, and train a flow, on an emulated default device; print what fails as JSON.

A process of its own, because torch takes such a device for good. Without one, a tensor that was made
on the default device and meets another on the CPU goes unnoticed on a machine that has no GPU.
"""

import json
import sys

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "elsewhere"


class Elsewhere(Tensor):
    """A tensor on the emulated device; its numbers lie in `inner` on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, *, tensor_contents=None):
        return f"Elsewhere({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatched(operator, args, kwargs or {})


class Device(TorchDispatchMode):
    """Catches what makes tensors, and the mistakes that a GPU does not forgive."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatched(operator, args, kwargs or {})


class Module(_DummyBackendModule):
    """What torch asks of a device beside its operators."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def dispatched(operator, args, kwargs):
    """Run an operator on the CPU, refuse what a device would refuse, and wrap what belongs there."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, Elsewhere)]
    device = kwargs.get("device")
    there = bool(ours) if device is None else device.type == NAME
    copies = operator.overloadpacket in (
        torch.ops.aten._to_copy,
        torch.ops.aten.copy_,
    )
    # a number in a tensor may lie anywhere, and so may places in a tensor that is there
    picks = operator.overloadpacket is torch.ops.aten.index
    picks = picks and isinstance(args[0], Elsewhere)
    strangers = any(t.dim() and not isinstance(t, Elsewhere) for t in tensors)
    if ours and strangers and not (copies or picks):
        raise RuntimeError(
            f"{operator}: expected all tensors to be on the same device, "
            f"found {NAME} and cpu"
        )
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(
            f"{operator}: expected a generator of {NAME}, found one of cpu"
        )
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner, options = tree_map_only(
        Elsewhere, lambda t: t.inner, (list(args), kwargs)
    )
    out = operator(*inner, **options)
    if operator.overloadpacket is torch.ops.aten.copy_:
        there = isinstance(args[0], Elsewhere)
    if not there:
        return out
    out = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(operator, args, kwargs, out)


def makes(row):
    """A row at all of its shapes, with context and without; the last one goes both ways."""
    for shape in row.event_shapes:
        for context_dim in (0, 2):
            f = row.make(shape, context_dim)
            places = {t.device.type for t in f.state_dict().values()}
            if places - {NAME}:
                raise RuntimeError(f"its tensors lie on {sorted(places)}")
    context = torch.randn(3, 2) if f.context_dim else None
    x, _ = f(biject_to(f.domain)(torch.randn(3, *shape)), context)
    f.inverse(x, context)


def trains():
    """A few steps of `fit`, on points that lie on the device."""
    from flowcourse.core import Flow
    from flowcourse.coupling import RealNVP
    from flowcourse.objectives import MaximumLikelihood
    from flowcourse.trainer import fit

    flow = Flow(RealNVP(2, 2, hidden=(8,)))
    x = torch.randn(64, 2)
    fit(
        MaximumLikelihood(flow),
        x,
        validation=x,
        steps=3,
        batch_size=16,
        progress=False,
    )
    if not flow.log_prob(x).isfinite().all():
        raise RuntimeError("log_prob is not finite")


def measures():
    """The metrics of two samples that lie on the device; the judge draws on the CPU."""
    from flowcourse.metrics import (
        classifier_auc,
        energy_distance,
        mmd,
        sliced_wasserstein,
        wasserstein,
    )
    from flowcourse.recipe import Recipe

    x, y, generator = torch.randn(40, 2), torch.randn(30, 2), cpu_generator()
    found = (
        wasserstein(x[:, 0], y[:, 0]),
        sliced_wasserstein(x, y, generator=generator),
        sliced_wasserstein(x, y),
        energy_distance(x, y),
        mmd(x, y),
        classifier_auc(
            x, y, recipe=Recipe(steps=3), generator=generator
        ).observed,
        classifier_auc(x, y, recipe=Recipe(steps=3)).predicted,
    )
    places = {t.device.type for t in found}
    if places != {NAME}:
        raise RuntimeError(f"they lie on {sorted(places)}")


def cpu_generator():
    """One whose numbers are sent to the device."""
    return torch.Generator("cpu").manual_seed(0)


def main():
    from flowcourse.zoo import rows

    works = {name: lambda row=row: makes(row) for name, row in rows.items()}
    works |= {"fit": trains, "metrics": measures}
    _setup_privateuseone_for_python_backend(NAME, Module())
    # `torch.tensor` makes its numbers here and sends them, in sight of `Device`
    torch._C._set_only_lift_cpu_tensors(True)
    failed = {}
    with Device(), torch.device(NAME):
        order = torch.arange(3)
        # the device notices what it is here for
        for wrong in (
            lambda: torch.equal(order.cpu(), order),
            lambda: torch.randperm(3, generator=torch.Generator("cpu")),
        ):
            try:
                wrong()
            except RuntimeError:
                continue
            failed["the device"] = "it accepts a tensor or generator of cpu"
        for name in sys.argv[1:] or works:
            try:
                works[name]()
            except Exception as e:  # noqa: BLE001 (all are told)
                failed[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
