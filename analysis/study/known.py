"""A problem whose similarity is known: Gaussian gradients, to test an estimator on.

The gradient of bin i on group m of B samples is Gaussian around a mean that is known:

    s_i^m = mu_i + xi_i^m,    xi_i^m ~ N(0, (nu / (B D)) I),    <mu_i, mu_j> = a_i a_j rho^|i-j|

so tr Sigma_i = nu for one sample, and at nu samples noise is as large as the mean of a bin of
strength a_i = 1. With shared draws xi is one vector for all bins of a group, with independent draws
one for each bin. The cosine of mean gradients over n = M B samples, as the literature takes it (the
plug-in), has then to first order the value

    shared        (a_i a_j rho_ij + nu/n) / sqrt((a_i^2 + nu/n) (a_j^2 + nu/n))
    independent    a_i a_j rho_ij         / sqrt((a_i^2 + nu/n) (a_j^2 + nu/n))

so with shared draws noise invents similarity, with independent ones it hides it. rho = 0.56 and
nu = 56 are near what a real base had: at 64 samples its neighbours read 0.77 with shared draws and
0.30 with independent ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from demerge.analysis.measurement.options import DRAWS
from demerge.analysis.partitioning.objective import check_choice
from demerge.analysis.similarity import normalised
from demerge.conflict import MIN_GROUPS, Array, ConflictMap, Origin
from demerge.errors import UsageError
from demerge.randomness import generator
from demerge.timesteps import Partition

T = 1000
STRENGTHS = (1.0,) * 8 + (0.3, 0.2)


@dataclass(frozen=True, slots=True)
class KnownProblem:
    """A problem with known truth."""

    strengths: tuple[float, ...] = field(default=STRENGTHS)  # a_i = |mu_i|, for N bins
    neighbours: float = 0.56  # rho, the cosine of two neighbours
    noise: float = 56.0  # nu
    dimensions: int = 256  # D >= N

    def __post_init__(self) -> None:
        is_cosine, least = -1 < self.neighbours < 1, min(self.strengths, default=0)
        if not (is_cosine and self.noise >= 0 and least > 0):
            fix = "give a cosine within (-1, 1), noise >= 0 and positive strengths"
            raise UsageError(f"{self} is not a problem", fix=fix)
        if self.dimensions < len(self.strengths):
            what = f"{self.dimensions} dimensions do not hold {len(self.strengths)} bins"
            raise UsageError(what, fix="give at least one dimension for each bin")

    @property
    def cosine(self) -> Array:
        """The true rho_ij [N N]."""
        i = np.arange(len(self.strengths))
        return np.asarray(np.float64(self.neighbours) ** abs(i[:, None] - i))

    @property
    def means(self) -> Array:
        """mu [N D]."""
        mu: Array = np.zeros((len(self.strengths), self.dimensions))
        mu[:, : len(mu)] = np.array(self.strengths)[:, None] * np.linalg.cholesky(self.cosine)
        return mu

    def predict_plug_in(self, samples: int, draws: str = "shared") -> Array:
        """Return the plug-in cosine that theory expects at n samples for each bin, [N N]."""
        check_choice("draws", draws, DRAWS)
        mu, N = self.means, len(self.strengths)
        shared = np.ones((N, N)) if draws == "shared" else np.eye(N)
        return normalised(mu @ mu.T + self.noise / samples * shared, np.ones(N, dtype=bool))

    def measure(
        self, *, groups: int = 8, batch_size: int = 8, draws: str = "shared", seed: int = 0
    ) -> ConflictMap:
        """Draw the gradients and return their map."""
        check_choice("draws", draws, DRAWS)
        if groups < MIN_GROUPS or batch_size < 1:
            fix = f"give {MIN_GROUPS} groups of 1 or more"
            raise UsageError(f"{groups} groups of {batch_size} are too few", fix=fix)
        mu, scale = self.means, (self.noise / (batch_size * self.dimensions)) ** 0.5
        shape = (1 if draws == "shared" else len(mu), groups, self.dimensions)
        noise = generator(seed, "analysis-known", draws).standard_normal(shape)
        rows = (mu[:, None] + scale * noise).reshape(-1, mu.shape[1])
        gram = (rows @ rows.T).reshape(len(mu), groups, len(mu), groups)
        origin = Origin(
            "known", "known", self.dimensions, "exact", draws, False, "euclid", batch_size, seed
        )
        return ConflictMap(Partition.uniform(T, len(mu)), gram, np.linspace(9, -10, T), origin)
