"""Guides of Pyro against NUTS on three real posteriors: two Gaussians and a flow, trained alike.

Eight schools (Rubin 1981), centred and not, with the priors N(0, 5) of the mean and half-Cauchy(5) of the
spread; and a logistic regression on the breast-cancer table, all 30 features standardised, with the prior N(0, 1)
of each weight and of the intercept. All guides have the same steps, particles, optimiser, schedule and limit of the
gradient. The learning rates were chosen from two or three in trials of another seed: for the Gaussians on the
centred schools, for the flow there too, before it had its present size. The steps are not enough for any guide to
end: on the centred schools twice as many gain 0.02 to 0.03 nat for the Gaussians and 0.07 for the flow (one seed).
All in float64, on one thread.

The posterior of the schools is the same in both forms. So the chains of the form that is not centred are the
reference of both; what NUTS makes of the centred one is recorded beside it. The chains are of 500 moves of warm-up,
thrown away, and 1000 more.
"""

import math
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.importance import vectorized_importance_weights

from flowcourse.core import Compose
from flowcourse.coupling import Couplings
from flowcourse.data import load
from flowcourse.diagnostics import (
    effective_sample_size,
    ess_share,
    pareto_k,
    r_hat,
)
from flowcourse.guides import AutoFlow
from flowcourse.linear import Triangular
from flowcourse.splines import RationalQuadraticSplineMap

torch.set_num_threads(1)  # seconds are of one thread

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
CHAINS, WARM_UP, KEPT = 4, 500, 1000
STEPS, PARTICLES = 3000, 32
CLIP = 10.0  # largest gradient norm
DRAWS = 20_000  # of a trained guide, in parts
PART = 5000
COUPLINGS = 4  # layers of the flow
PAIRS = 400  # of a sample that is kept for a picture
LEVELS = tuple((i + 0.5) / 25 for i in range(25))  # of quantiles


def numbers(values):
    """A tensor of float64."""
    return torch.tensor(values, dtype=torch.float64)


def schools_centred(y, sigma):
    """Effects around a common mean, with an unknown spread: a funnel."""
    zero = torch.zeros_like(y[0])
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools(y, sigma):
    """The same model, in which each effect is a standard normal number, stretched."""
    zero = torch.zeros_like(y[0])
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def logistic(x, y):
    """Labels of tumours from standardised features, the first of which is 1."""
    with pyro.plate("features", x.shape[1]):
        w = pyro.sample("weights", dist.Normal(torch.zeros_like(x[0, 0]), 1.0))
    with pyro.plate("tumours", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=w @ x.T), obs=y)


def tumours():
    """The table: a one and standardised features, and labels."""
    rows = load("breast-cancer")
    x = rows.x.double()
    x = (x - x.mean(0)) / x.std(0)
    return torch.cat([torch.ones_like(x[:, :1]), x], 1), rows.y.double()


def coordinates(found):
    """Latents side by side, shape `(*draws, d)`, the same numbers for both forms of the schools."""
    if "weights" in found:
        return found["weights"]
    tau = found["tau"].flatten()[:, None]
    mu = found["mu"].flatten()[:, None]
    theta = found["theta"] if "theta" in found else mu + tau * found["eta"]
    return torch.cat([mu, tau.log(), theta], -1)


SCHOOLS = ["mu", "log tau", *(f"theta {i + 1}" for i in range(8))]
POSTERIORS = {
    "eight schools, centred": (
        schools_centred,
        lambda: (numbers(EFFECTS), numbers(ERRORS)),
        SCHOOLS,
    ),
    "eight schools": (
        schools,
        lambda: (numbers(EFFECTS), numbers(ERRORS)),
        SCHOOLS,
    ),
    "logistic regression": (
        logistic,
        tumours,
        ["intercept", *(f"weight {i + 1}" for i in range(30))],
    ),
}


def flow(d):
    """Splines that couple, then a matrix: without the splines a Gaussian of any covariance."""
    spline = RationalQuadraticSplineMap(8, 5.0)
    couplings = Couplings(
        d, scalar_map=spline, layers=COUPLINGS, hidden=(32, 32)
    )
    return Compose(couplings, Triangular(d))


GUIDES = {  # what makes it, and its learning rate
    "mean field": (AutoNormal, 3e-2),
    "full rank": (AutoMultivariateNormal, 3e-2),
    "flow": (partial(AutoFlow, bijection=flow), 1e-2),
}

jobs = [{"posterior": name, "method": "NUTS"} for name in POSTERIORS]
jobs += [
    {"posterior": posterior, "method": method, "seed": seed}
    for seed in range(3)
    for posterior in POSTERIORS
    for method in GUIDES
]


def rounded(x, digits=3):
    """Numbers for a record."""
    return [round(v, digits) for v in x.tolist()]


def marginals(names, x):
    """What is kept of draws, shape `(n, d)`: means, deviations and quantiles of each coordinate."""
    q = x.quantile(numbers(LEVELS), 0)
    return {
        "names": names,
        "mean": rounded(x.mean(0), 4),
        "sd": rounded(x.std(0), 4),
        "levels": LEVELS,
        "quantiles": [rounded(column) for column in q.T],
    }


def pairs(x):
    """Some draws of the spread's logarithm and of one effect."""
    some = x[:: max(len(x) // PAIRS, 1)][:PAIRS]
    return {"log tau": rounded(some[:, 1]), "theta 1": rounded(some[:, 2])}


def chains(model, data, names):
    """NUTS from different places: draws, and what they are worth."""
    kept, divergent = [], 0
    for seed in range(CHAINS):
        pyro.set_rng_seed(seed)
        kernel = NUTS(
            model,
            target_accept_prob=0.9,
            jit_compile=True,
            ignore_jit_warnings=True,
        )
        chain = MCMC(kernel, KEPT, WARM_UP, disable_progbar=True)
        chain.run(*data)
        kept.append(coordinates(chain.get_samples()))
        divergent += len(chain.diagnostics()["divergences"]["chain 0"])
    states = torch.stack(kept, 1)  # kept, chains, d
    found = {
        "R-hat": rounded(r_hat(states), 4),
        "ESS": rounded(effective_sample_size(states), 0),
        "divergences": divergent,
    }
    settings = {"chains": CHAINS, "warm-up": WARM_UP, "kept": KEPT}
    return states.flatten(0, 1), found, settings


def train(model, data, make, lr, seed):
    """A trained guide, and its mean loss in each twentieth of the steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make(model)
    guide(*data)
    elbo = Trace_ELBO(PARTICLES, 1, vectorize_particles=True)
    optimizer = torch.optim.Adam(guide.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS))
    )
    losses = []
    for _ in range(STEPS):
        loss = elbo.differentiable_loss(model, guide, *data)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return guide, rounded(numbers(losses).reshape(20, -1).mean(1))


@torch.no_grad()
def judge(model, guide, data, seed):
    """Fresh draws of a trained guide, and what importance weights say of it."""
    pyro.set_rng_seed(1000 + seed)
    log_w, draws = [], []
    for _ in range(DRAWS // PART):
        weights, trace, _ = vectorized_importance_weights(
            model, guide, *data, num_samples=PART, max_plate_nesting=1
        )
        log_w.append(weights)
        latents = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        draws.append(coordinates(latents))
    log_w = torch.cat(log_w)
    found = {
        "ELBO [nat]": log_w.mean().item(),
        "standard error [nat]": log_w.std().item() / math.sqrt(DRAWS),
        "k-hat": pareto_k(log_w),
        "ESS share": ess_share(log_w),
        "log Z [nat]": (log_w.logsumexp(0) - math.log(DRAWS)).item(),
    }
    return torch.cat(draws), {k: round(v, 4) for k, v in found.items()}


def run(folder, posterior, method, seed=0):
    """Chains of NUTS, or one guide, trained and judged."""
    model, data, names = POSTERIORS[posterior]
    data = data()
    start = time.process_time()
    if method == "NUTS":
        draws, results, settings = chains(model, data, names)
        found = {"settings": settings}
    else:
        make, lr = GUIDES[method]
        guide, losses = train(model, data, make, lr, seed)
        draws, results = judge(model, guide, data, seed)
        found = {
            "settings": {"lr": lr, "particles": PARTICLES, "clip": CLIP},
            "steps": STEPS,
            "draws": DRAWS,
            "parameters": sum(p.numel() for p in guide.parameters()),
            "losses": losses,
        }
    took = time.process_time() - start
    found["marginals"] = marginals(names, draws)
    if seed == 0 and names is SCHOOLS:
        found["pairs"] = pairs(draws)
    return {"results": results, "seconds": round(took, 2)} | found
