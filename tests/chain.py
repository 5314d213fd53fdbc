"""A known source that over-uses a phrase, with exact rates: for tests and bench/phrases.py."""

import math

import numpy as np

from tests.profiles import toy_profile


class Chain:
    """An order-2 chain over V tokens that writes the phrase "a b c" ten times as often as people,
    and the exact rates of its texts: no text is sampled, so no test fails by chance."""

    V, A, B, C = 24, 0, 1, 2
    HUMAN = 0.60
    """People's rate of the phrase, per 1,000 tokens."""

    def __init__(self):
        source = np.random.default_rng(7)
        p_UUV = source.dirichlet(np.full(self.V, 2.0), (self.V, self.V))
        p_UUV[:, :, self.A] = 0.019
        p_UUV[:, self.A, self.B] = 0.38
        p_UUV[self.A, self.B, self.C] = 0.796
        for u1 in range(self.V):
            for u2 in range(self.V):
                fixed = [self.A]
                fixed += [self.B] if u2 == self.A else []
                fixed += [self.C] if (u1, u2) == (self.A, self.B) else []
                fixed_p = p_UUV[u1, u2, fixed].sum()
                others = np.setdiff1d(np.arange(self.V), fixed)
                p_UUV[u1, u2, others] *= (1 - fixed_p) / p_UUV[u1, u2, others].sum()
        self.p_UUV = p_UUV

    def stationary(self, p_UUV):
        pairs_UU = np.full((self.V, self.V), self.V**-2.0)
        for _ in range(200):
            pairs_UU = np.einsum("ij,ijk->jk", pairs_UU, p_UUV)
        return pairs_UU

    def rates(self, p_UUV):
        """Rates per 1,000 tokens: the phrase, "ab" not followed by "c", "a" not followed by "b"."""
        pairs_UU = self.stationary(p_UUV)
        phrase = pairs_UU[self.A, self.B] * p_UUV[self.A, self.B, self.C]
        orphan = pairs_UU[self.A, self.B] - phrase
        innocent = pairs_UU[self.A].sum() - pairs_UU[self.A, self.B]
        return 1000 * np.array([phrase, orphan, innocent])

    def profile(self, rate):
        """A profile with the exact chances of completion, for a phrase with this rate."""
        pairs_UU, a, b, c = self.stationary(self.p_UUV), self.A, self.B, self.C
        into_a_U = pairs_UU[:, a] / pairs_UU[:, a].sum()
        after_ab = self.p_UUV[a, b, c]
        after_a = (into_a_U * self.p_UUV[:, a, b]).sum() * after_ab
        ratio = math.log(rate / self.HUMAN)
        chances = {(a,): after_a, (a, b): after_ab, (a, b, c): 1.0}
        factors = {s: math.log1p(math.expm1(-ratio) * h) for s, h in chances.items()}
        return toy_profile([(a, b, c)], factors, self.V)
