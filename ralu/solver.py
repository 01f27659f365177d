"""Solvers of dx/dsigma = v inside a stage, by the velocity v' that each makes a step with. Tensors or plain numbers.

With h = next sigma - sigma, h0 the step before it and v0 that step's velocity, x' = x + h·v':

euler        v' = v. First order; the paper's.
ab2          v' = v + d/2 with d = h/h0·(v - v0), Adams-Bashforth of second order with variable steps (Hairer, Norsett
             and Wanner, Solving Ordinary Differential Equations I, III.5): d is how much v will change on the way if it
             goes on changing as it did.
ab2-limited  v' = v + d/2 / (1 + r^4) with r = 2·|d| / (|x0|² + |noise|²)^(1/2), a limiter as finite volumes have it for
             slopes; v = noise - x0 takes those two for the parts of x. A change that is small beside them is trusted
             whole, and little is left of one of more than half of them: a few long steps are almost Euler's, where ab2
             overshoots. As steps shorten it becomes ab2.

The second-order ones begin a stage with an Euler step and call the model no more often.
"""

from collections.abc import Callable
from typing import Any

SOLVERS = ("euler", "ab2", "ab2-limited")
_HALF_TRUSTED = 0.5  # the change, as a share of image and noise, of which the limiter leaves a half
_TINY = 1e-30  # keeps a sample of nothing from dividing by 0


def sample_squares(x):
    """Return the sum of squares of each sample of a tensor (B, ...), as (B, 1, ...)."""
    return x.flatten(1).square().sum(dim=1).view(-1, *[1] * (x.ndim - 1))


class Solver:
    """A solver with its history, which is one velocity and one step.

    name:    of `SOLVERS`.
    squares: the sum of squares of each sample of a batch, in a shape that multiplies velocities.
    """

    def __init__(self, name: str, squares: Callable = sample_squares):
        self.name, self.squares = name, squares
        self.restart()

    def restart(self):
        """Forget the history: other samples begin."""
        self.previous: Any = None

    def __call__(self, sample, velocity, sigma, following):
        """Return the velocity to go from one noise level to the following one with."""
        if self.name == "euler":
            return velocity
        step, previous = following - sigma, self.previous
        self.previous = 1 * velocity, step  # a copy: a model's next output may take the memory of this one
        if previous is None:
            return velocity
        change = step / previous[1] * (velocity - previous[0])
        if self.name == "ab2":
            return velocity + change / 2
        parts = self.squares(sample - sigma * velocity) + self.squares(sample + (1 - sigma) * velocity)
        share = self.squares(change) / (_HALF_TRUSTED**2 * parts + _TINY)  # r²
        return velocity + change / (2 * (1 + share * share))
