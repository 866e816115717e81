"""A boundary between two experts in all conventions, and how many training draws each one gets.

The draws are of u (`demerge.timestep_conventions.Density`), shifted, and not limited to a range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demerge.analysis.partitioning.options import BoundaryOptions
from demerge.timestep_conventions import MEANINGS, Convention, density_of, from_sigma, to_sigma
from demerge.trainers import TRAINERS

FEW = 0.05  # share of the draws below which an expert is hardly trained


@dataclass(frozen=True, slots=True)
class BoundaryCheck:
    """A boundary in all conventions.

    Attributes:
        values: the boundary by convention.
        high: the share of the draws that the expert of high noise gets.
    """

    options: BoundaryOptions
    values: Mapping[Convention, float]
    high: float

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the shares."""
        sides = (("high", self.high, "raise"), ("low", 1 - self.high, "lower"))
        return [
            f"the {side}-noise expert gets {share:.1%} of the draws; {verb} the shift, or draw in "
            "its range alone"
            for side, share, verb in sides
            if share < FEW
        ]

    def lines(self) -> list[str]:
        """Return the check for a person."""
        o = self.options
        head = f"{o.boundary:g} as {o.convention}, shift {o.shift:g}, T {o.num_train_timesteps}"
        lines = [f"boundary  {head}"]
        for convention, value in self.values.items():
            users: list[str] = [
                name for name, each in TRAINERS.items() if each.convention == convention
            ]
            users += ["diffusers' boundary_ratio"] if convention == "sigma" else []
            if o.shift != 1 and "ai-toolkit" in users:  # its schedule has no shift
                own = from_sigma(self.values["sigma"], convention)
                users[users.index("ai-toolkit")] = f"ai-toolkit has no shift: {own:.5g}"
            meaning = f"{MEANINGS[convention]} ({', '.join(users)})"
            lines.append(f"{convention:<10}{f'{value:.5g}':<10}{meaning}")
        shares = f"{self.high:.1%} to high noise, {1 - self.high:.1%} to low noise"
        lines.append(f"draws     {shares} ({o.density})")
        return [*lines, *(f"warning   {warning}" for warning in self.warnings)]

    def document(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        draws = {"high_noise": self.high, "low_noise": 1 - self.high}
        return {
            "options": self.options.document(),
            "conventions": dict(self.values),
            "draws": draws,
            "warnings": self.warnings,
        }


def check_boundary(options: BoundaryOptions) -> BoundaryCheck:
    """Return a boundary in all conventions, with the share of the draws on each side."""
    import torch

    s, T = options.shift, options.num_train_timesteps
    sigma = to_sigma(options.boundary, options.convention, s, T)
    values = {convention: from_sigma(sigma, convention, s, T) for convention in MEANINGS}
    u = torch.tensor(values["unshifted"], dtype=torch.float64)
    return BoundaryCheck(options, values, 1 - float(density_of(options).cdf(u)))
