"""Solvers of dx/dsigma = v inside a stage, by the velocity v' that each makes a step with. Tensors or plain numbers.

With h = next sigma - sigma, h0 the step before it and v0 that step's velocity, x' = x + h·v':

euler        v' = v. First order; the paper's.
ab2          v' = v + d/2 with d = h/h0·(v - v0), Adams-Bashforth of second order with variable steps (Hairer, Norsett
             and Wanner, Solving Ordinary Differential Equations I, III.5): d is how much v will change on the way if it
             goes on changing as it did.
ab2-limited  v' = v + d/2 / (1 + (2·|d|/|v|)^4): a limiter, as slopes have it in finite volumes, on each sample's norms.
             A change that is small beside v is trusted whole, and of one beyond half of v little is left: a few long
             steps are Euler's, where ab2 overshoots. As steps shorten it becomes ab2.

The second-order ones begin a stage with an Euler step and call the model no more often.
"""

from collections.abc import Callable
from typing import Any

SOLVERS = ("euler", "ab2", "ab2-limited")
_LARGEST_CHANGE = 0.5  # of a velocity, in one step, that is half trusted
_TINY = 1e-12  # keeps a velocity of 0 from dividing by 0


class Solver:
    """A solver with its history, which is one velocity and one step.

    name: of `SOLVERS`.
    norm: a velocity's, for each sample of a batch, in a shape that multiplies velocities.
    """

    def __init__(self, name: str, norm: Callable = abs):
        self.name, self.norm = name, norm
        self.restart()

    def restart(self):
        """Forget the history: other samples begin."""
        self.previous: Any = None

    def __call__(self, velocity, sigma, following):
        """Return the velocity to go from one noise level to the following one with, in the dtype of the model's."""
        if self.name == "euler":
            return velocity
        step, previous = following - sigma, self.previous
        self.previous = 1 * velocity, step  # a copy: a model's next output may take the memory of this one
        if previous is None:
            return velocity
        change = step / previous[1] * (velocity - previous[0])
        if self.name == "ab2":
            return velocity + change / 2
        share = self.norm(change) / (_LARGEST_CHANGE * self.norm(velocity) + _TINY)
        square = share * share
        return velocity + change / (2 * (1 + square * square))


def sample_norms(velocity):
    """Return the norm of each sample of a tensor (B, ...), as (B, 1, ...)."""
    return velocity.flatten(1).norm(dim=1).view(-1, *[1] * (velocity.ndim - 1))
