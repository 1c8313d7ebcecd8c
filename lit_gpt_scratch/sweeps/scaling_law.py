"""Scaling law of the loss over parameters and training tokens: fit, intervals, and compute-optimal sizes.

The law is ``L(N, D) = E + A / N**alpha + B / D**beta``, fitted as in approach 3 of the Chinchilla paper
(https://arxiv.org/abs/2203.15556): the Huber loss of the residuals of log L is minimized with L-BFGS from a grid of
starts. Two mistakes of the original fit are avoided (https://arxiv.org/abs/2404.10102): the objective is the sum of the
losses, not their mean, and the minimizer runs to full precision, because it otherwise stops early, with wrong
coefficients and intervals that are far too narrow.

In this law, more tokens improve models of all sizes by the same amount. Very small models improve less than larger
ones, which ``L(N, D) = E + (A / N**alpha + B / D**beta)**gamma`` describes (https://arxiv.org/abs/2502.08606); with
``E = 0``, it is the law of https://arxiv.org/abs/2001.08361. It is used if it predicts left-out points better.

N counts all parameters, including the embedding and the output head. Without them, the exponents of models as small as
these, of which the embeddings are a large part, do not carry over to larger models (https://arxiv.org/abs/2406.12907).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError

CONFIDENCE: Final = 0.9
"""Probability with which an interval of a scaling law contains its value."""
N_RESAMPLES: Final = 1000
"""Number of bootstrap resamples."""
HUBER_DELTA: Final = 0.01
"""Residual of log L beyond which the Huber loss is linear.

It is about twice the standard deviation between seeds of runs of a few minutes. Chinchilla's 0.001 suits runs with less
noise; here it would minimize the absolute residuals, whose optimum is less precise.
"""
MIN_SETTINGS: Final = 3
"""Minimum number of distinct sizes, and of distinct token counts, that identify the coefficients."""
MIN_GAMMA, MAX_GAMMA = 0.05, 2.0
"""Bounds of gamma."""
MIN_POINTS: Final = 7
"""Minimum number of points, with which the residuals of five fitted coefficients are not always near zero."""
MIN_POINTS_FOR_GAMMA: Final = 12
"""Minimum number of points, twice as many as the coefficients, with which fitting gamma is tried."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScalingLaw:
    """Coefficients of ``L(N, D) = E + (A / N**alpha + B / D**beta)**gamma``."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Return the loss of models with N ``parameters`` that are trained on D ``tokens``, both floats or arrays."""
        return self.E + (self.A * parameters**-self.alpha + self.B * tokens**-self.beta) ** self.gamma

    def __str__(self) -> str:
        """Return the law as a formula of N and D."""
        terms = f"{self.A:.4g} / N^{self.alpha:.3f} + {self.B:.4g} / D^{self.beta:.3f}"
        return f"{self.E:.3f} + {terms if self.gamma == 1 else f'({terms})^{self.gamma:.3f}'}"


@dataclass(frozen=True)
class TrainingCost:
    """Training FLOPs per token, ``factor * N**exponent``; the usual approximation is ``6 * N``.

    Small models need fewer FLOPs per parameter, because looking up an embedding takes none, and more for attention.

    Args:
        factor: FLOPs per token of a model with one parameter.
        exponent: Exponent of the number of parameters.
    """

    factor: float = 6.0
    exponent: float = 1.0

    def flops_per_token(self, parameters: Any) -> Any:
        """Return the FLOPs per token of models with N ``parameters``, a float or an array."""
        return self.factor * parameters**self.exponent

    @classmethod
    def fit(cls, parameters: Floats, flops_per_token: Floats) -> "TrainingCost":
        """Fit a power law to recorded FLOPs by least squares of the logarithms."""
        exponent, intercept = np.polyfit(np.log(parameters), np.log(flops_per_token), 1)
        return cls(math.exp(intercept), float(exponent))


class Optimum(NamedTuple):
    """Compute-optimal model for a number of training FLOPs."""

    parameters: float
    tokens: float
    loss: float


def compute_optimum(law: ScalingLaw, cost: TrainingCost, flops: float) -> Optimum:
    """Return the numbers of parameters and tokens that minimize the loss for a number of training FLOPs.

    With ``C = k * N**g * D``, the derivative of the loss by N is zero at
    ``N**(alpha + g * beta) = alpha * A / (g * beta * B) * (C / k)**beta``, whatever gamma is.
    """
    g = cost.exponent
    ratio = law.alpha * law.A / (g * law.beta * law.B)
    parameters = (ratio * (flops / cost.factor) ** law.beta) ** (1 / (law.alpha + g * law.beta))
    tokens = flops / cost.flops_per_token(parameters)
    return Optimum(parameters, tokens, law.loss(parameters, tokens))


class Interval(NamedTuple):
    """Estimate with the bounds of its ``CONFIDENCE`` interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __contains__(self, value: object) -> bool:
        """Return whether a value is inside the interval."""
        return isinstance(value, float) and self.low <= value <= self.high


class MeasuredPoint(NamedTuple):
    """Size and training length with the losses of its runs, one per seed."""

    parameters: float
    tokens: float
    flops_per_token: float
    losses: tuple[float, ...]

    @property
    def flops(self) -> float:
        """Training FLOPs of one run."""
        return self.tokens * self.flops_per_token

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Prediction:
    """Prediction of a run that has not started yet.

    Args:
        predicted_at: Time of the prediction in ISO 8601.
        parameters: Number of parameters.
        tokens: Number of training tokens.
        flops: Training FLOPs.
        loss: Predicted mean loss over the seeds.
        low: Lower bound of its interval.
        high: Upper bound of its interval.
        confidence: Probability with which the interval contains the measured mean.
        n_runs: Number of runs to which the law was fitted.
    """

    predicted_at: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    low: float
    high: float
    confidence: float
    n_runs: int

    def describe(self) -> str:
        """Return the predicted loss with its interval."""
        return f"{self.loss:.3f}, {self.confidence:.0%} interval {self.low:.3f} to {self.high:.3f}"


def fit_scaling_law(
    parameters: Floats, tokens: Floats, losses: Floats, start: ScalingLaw | None = None, fits_gamma: bool = False
) -> ScalingLaw:
    """Fit the law to runs.

    Args:
        parameters: (n,), number of parameters of each run.
        tokens: (n,), number of training tokens.
        losses: (n,), loss, such as bits per byte.
        start: Only start of the minimizer; a grid of starts with gamma = 1 by default.
        fits_gamma: Whether gamma is fitted, too; otherwise, it is 1.

    Raises:
        UserError: There are too few distinct sizes or token counts.
    """
    for name, values in (("sizes", parameters), ("token counts", tokens)):
        if (found := len(set(values.tolist()))) < MIN_SETTINGS:
            raise UserError(
                f"scaling: the finished runs have {found} different {name}, but the coefficients of the law require at "
                f"least {MIN_SETTINGS}; add some under vary"
            )
    from scipy.optimize import minimize  # not installed with fit, which only evaluates a fitted law

    # The terms are divided by their values at the geometric means, and raised to the power of gamma, which makes the
    # coefficients nearly independent: a, alpha, b and beta below are those of the terms to the power of gamma.
    log_n, log_d, log_l = np.log(parameters), np.log(tokens), np.log(losses)
    center_n, center_d = log_n.mean(), log_d.mean()
    x, y = log_n - center_n, log_d - center_d
    lowest = float(losses.min())

    def objective(theta: Floats) -> tuple[float, Floats]:
        e, a, b, alpha, beta, log_gamma = theta
        gamma = math.exp(log_gamma)
        terms = np.stack([a - alpha * x, b - beta * y]) / gamma  # (2, n)
        log_sum = np.logaddexp(*terms)
        reducible = np.exp(gamma * log_sum)
        total = math.exp(e) + reducible
        residual = (np.log(total) - log_l) / HUBER_DELTA
        clipped = residual.clip(-1.0, 1.0)  # the derivative of the Huber loss
        value = float((clipped * (residual - 0.5 * clipped)).sum())
        slope = clipped / HUBER_DELTA / total  # by the loss of the law
        shares = np.exp(terms - log_sum)  # (2, n)
        by_a, by_b = slope * reducible * shares
        by_gamma = slope * reducible * gamma * (log_sum - (shares * terms).sum(0))
        gradient = [slope * math.exp(e), by_a, by_b, -by_a * x, -by_b * y, by_gamma]
        return value, np.stack(gradient).sum(1)

    if start is not None:
        a, b = math.log(start.A) - start.alpha * center_n, math.log(start.B) - start.beta * center_d
        terms = [start.gamma * each for each in (a, b, start.alpha, start.beta)]
        starts = [[math.log(start.E), *terms, math.log(start.gamma)]]
    else:
        rest = [math.log((float(np.median(losses)) - share * lowest) / 2) for share in (0.3, 0.6, 0.9)]
        floors = [math.log(share * lowest) for share in (0.3, 0.6, 0.9)]
        exponents = list(itertools.product((0.3, 0.6, 1.2), repeat=2))
        grid = itertools.product(zip(floors, rest, strict=True), exponents)
        starts = [[e, r, r, *each, 0.0] for (e, r), each in grid]
    bounds = [(math.log(1e-3 * lowest), math.log(lowest)), (-12, 5), (-12, 5), (0.01, 3.0), (0.01, 3.0)]
    bounds.append((math.log(MIN_GAMMA), math.log(MAX_GAMMA)) if fits_gamma else (0.0, 0.0))
    options = {"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-8}
    fits = [minimize(objective, each, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for each in starts]
    e, a, b, alpha, beta, log_gamma = map(float, min(fits, key=lambda fit: float(fit.fun)).x)
    gamma = math.exp(log_gamma)
    a, alpha, b, beta = a / gamma, alpha / gamma, b / gamma, beta / gamma
    return ScalingLaw(math.exp(e), math.exp(a + alpha * center_n), math.exp(b + beta * center_d), alpha, beta, gamma)


@dataclass(frozen=True)
class LadderFit:
    """Law fitted to a ladder of runs, with bootstrap intervals.

    The residuals are resampled, not the runs: sizes and token counts are chosen, not drawn, and without some of them a
    resample would not identify the coefficients. All runs of a point (its seeds) receive the residuals of one other
    point, because they share the deviation of the true loss from the law. Residuals are multiplied by
    ``sqrt(n / (n - k))`` for n points and k fitted coefficients, because the fit makes them smaller. The quantiles are
    as far out as those of Student's t distribution with n - k degrees of freedom, because bootstrap intervals of few
    points are otherwise too narrow (expanded percentile intervals, https://arxiv.org/abs/1411.5279).

    Args:
        points: Sizes and training lengths with their losses.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """

    points: tuple[MeasuredPoint, ...]
    n_resamples: int = N_RESAMPLES
    seed: int = 0

    @cached_property
    def law(self) -> ScalingLaw:
        """Law fitted to all runs, with the gamma that predicts left-out points better: 1, or a fitted one.

        Raises:
            UserError: There are too few points, sizes or token counts.
        """
        law = fit_scaling_law(*self._columns, self._losses)
        if len(self.points) < MIN_POINTS:
            raise UserError(
                f"scaling: {len(self.points)} trials have finished, but a law with intervals requires at least "
                f"{MIN_POINTS}; add sizes or training lengths under vary"
            )
        if len(self.points) < MIN_POINTS_FOR_GAMMA:
            return law
        general = fit_scaling_law(*self._columns, self._losses, law, fits_gamma=True)
        return min(law, general, key=self.prediction_error)

    def prediction_error(self, law: ScalingLaw) -> float:
        """Return the root mean square error of log L in leave-one-out cross-validation of the points.

        Args:
            law: Law fitted to all points, from which the minimizer starts; gamma is only fitted if it is not 1 here.
        """
        (parameters, tokens), losses = self._columns, self._losses
        owner = np.repeat(np.arange(len(self.points)), [len(point.losses) for point in self.points])
        errors = []
        for index, point in enumerate(self.points):
            rest = owner != index
            try:
                fitted = fit_scaling_law(parameters[rest], tokens[rest], losses[rest], law, law.gamma != 1)
            except UserError:  # without this point, there are too few sizes or token counts
                continue
            errors.append(math.log(point.mean / fitted.loss(point.parameters, point.tokens)))
        return math.sqrt(np.mean(np.square(errors))) if errors else math.inf

    @property
    def n_coefficients(self) -> int:
        """Number of fitted coefficients."""
        return 5 if self.law.gamma == 1 else 6

    @cached_property
    def cost(self) -> TrainingCost:
        """Training FLOPs per token, fitted to the recorded FLOPs of each size."""
        sizes = {point.parameters: point.flops_per_token for point in self.points}
        return TrainingCost.fit(np.array(list(sizes)), np.array(list(sizes.values())))

    @cached_property
    def residuals(self) -> list[Floats]:
        """Corrected residuals of log L, one array per point."""
        n, k = len(self.points), self.n_coefficients
        correction = math.sqrt(n / (n - k)) if n > k else 1.0
        return [
            correction * np.log(np.array(point.losses) / self.law.loss(point.parameters, point.tokens))
            for point in self.points
        ]

    @cached_property
    def resampled_laws(self) -> list[ScalingLaw]:
        """Laws fitted to the bootstrap resamples."""
        random = np.random.default_rng(self.seed)
        parameters, tokens = self._columns
        fitted, n = self.law.loss(parameters, tokens), len(self.points)
        laws = []
        for _ in range(self.n_resamples):
            drawn = [
                np.resize(random.permutation(self.residuals[source]), len(point.losses))
                for point, source in zip(self.points, random.integers(n, size=n), strict=True)
            ]
            resampled = fitted * np.exp(np.concatenate(drawn))
            laws.append(fit_scaling_law(parameters, tokens, resampled, self.law, self.law.gamma != 1))
        return laws

    def intervals(self, values: Callable[[ScalingLaw], Sequence[float]]) -> list[Interval]:
        """Return values that are computed from the law, each with its bootstrap interval."""
        samples = np.array([values(law) for law in self.resampled_laws])  # (resamples, values)
        return [self._interval(value, column) for value, column in zip(values(self.law), samples.T, strict=True)]

    def coefficients(self) -> dict[str, Interval]:
        """Return the fitted coefficients with their intervals, keyed by name."""
        return dict(list(zip(asdict(self.law), self.intervals(astuple), strict=True))[: self.n_coefficients])

    def optimum(self, flops: float) -> dict[str, Interval]:
        """Return the fields of the compute-optimal model with their intervals, keyed by name."""
        found = self.intervals(lambda law: compute_optimum(law, self.cost, flops))
        return dict(zip(Optimum._fields, found, strict=True))

    def predict(self, parameters: float, tokens: float) -> Interval:
        """Predict the mean loss over the seeds of a new size or training length.

        The interval includes the uncertainty of the law, the noise between seeds, and the deviation of single points
        from the law, both drawn from the residuals.
        """
        noise = np.exp([float(each.mean()) for each in self.residuals])  # (points,)
        losses = np.array([law.loss(parameters, tokens) for law in self.resampled_laws])  # (resamples,)
        return self._interval(self.law.loss(parameters, tokens), np.outer(losses, noise))

    @property
    def _columns(self) -> tuple[Floats, Floats]:
        """Parameters and tokens of all runs."""
        repeated = [(point.parameters, point.tokens) for point in self.points for _ in point.losses]
        parameters, tokens = np.array(repeated).T
        return parameters, tokens

    @property
    def _losses(self) -> Floats:
        return np.array([loss for point in self.points for loss in point.losses])

    def _interval(self, value: float, samples: Floats) -> Interval:
        from scipy.special import ndtr, stdtrit

        tail = float(ndtr(stdtrit(max(1, len(self.points) - self.n_coefficients), (1 - CONFIDENCE) / 2)))
        low, high = np.quantile(samples, [tail, 1 - tail])
        return Interval(float(value), float(low), float(high))
