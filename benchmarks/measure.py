"""How things are timed: interleaved rounds, medians, and the memory of one training step."""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer


def peak_memory(
    call: Callable[[], object],  # What to watch
) -> int:  # Bytes
    """The most memory that tensors made during a call held at once, beyond what was there before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as watch:
        call()
    events = [
        e
        for e in watch.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Runner:
    """One model in all modes, eager or compiled: a call does one unit of the work that is timed."""

    def __init__(
        self,
        model: nn.Module,  # Of a case
        batch: tuple[Tensor, ...],  # What its `loss` takes
        compiled: bool = False,  # Go through torch.compile
    ):
        wrap = torch.compile if compiled else (lambda f: f)
        self.model, self.batch = model, batch
        self._loss, self._sample = wrap(model.loss), wrap(model.sample)
        self._log_prob = wrap(model.log_prob) if model.log_prob else None
        # So small a rate leaves the model as it is: the last round times the
        # same as the first.
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-7)

    def call(
        self,
        mode: str,  # "train", "log_prob" or "sample"
    ) -> Callable[[], object]:  # Without arguments
        """What is timed; the model is put into the right state for it."""
        self.model.train(mode == "train")
        self.model.prepare(mode)
        return getattr(self, mode)

    def train(self) -> Tensor:
        """Forward, backward, and a step of Adam."""
        self.optimizer.zero_grad()
        loss = self._loss(*self.batch)
        loss.backward()
        self.optimizer.step()
        self.model.after_step()
        return loss

    @torch.no_grad()
    def log_prob(self) -> Tensor:
        """Log-densities of the batch."""
        return self._log_prob(*self.batch)

    @torch.no_grad()
    def sample(self) -> Tensor | tuple[Tensor, Tensor]:
        """As many samples as the batch has points."""
        return self._sample(len(self.batch[0]), *self.batch[1:])


def check(
    runner: Runner,  # Of one model
    modes: tuple[str, ...],  # What the case times
):
    """Raise a `ValueError` unless everything that is timed gives finite numbers."""
    for mode in modes:
        out = runner.call(mode)()
        for tensor in out if isinstance(out, tuple) else (out,):
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{mode}: expected finite numbers, got {tensor}"
                )
            if mode != "train" and len(tensor) != len(runner.batch[0]):
                raise ValueError(
                    f"{mode}: expected a batch, got shape {tuple(tensor.shape)}"
                )


def interleaved(
    # From a key to what puts a call in its place
    calls: dict[object, Callable[[], Callable]],
    rounds: int,  # How often each is measured
    threads: int,  # Of torch
    at_least: float = 0.02,  # Seconds that one measurement takes
) -> dict[object, list[float]]:  # For each key, seconds per call in each round
    """Measure calls in turn, round after round, so that a disturbance meets all of them."""

    def measure(key, number):
        timer = Timer(
            "call()", globals={"call": calls[key]()}, num_threads=threads
        )
        return timer.timeit(number).mean

    numbers = {}
    for key in calls:
        measure(key, 1)
        numbers[key] = max(1, math.ceil(at_least / measure(key, 1)))
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key in calls:
            times[key].append(measure(key, numbers[key]))
    return times


def summary(
    times: list[float],  # Seconds per call, one for each round
) -> dict:  # Median and quartiles in seconds, and the rounds themselves
    """Describe the rounds."""
    low, middle, high = quartiles(times)
    return {
        "median": middle,
        "q1": low,
        "q3": high,
        "rounds": [float(f"{t:.4g}") for t in times],
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratio(
    ours: list[float],  # Seconds in each round
    theirs: list[float],  # Of another contestant, in the same rounds
) -> dict:  # Median and quartiles of the quotient within a round
    """Compare round by round: what slows a whole round down cancels."""
    low, middle, high = quartiles(
        [a / b for a, b in zip(ours, theirs, strict=True)]
    )
    return {"ratio": middle, "q1": low, "q3": high}
