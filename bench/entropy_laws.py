"""Other laws that heat logits by their entropy, as in-place functions on float32 logits [R, V]."""

import math

import numpy as np
import torch
from torch import Tensor


def naive(logits_RV: Tensor) -> None:
    """Our law written plainly, at level .5: softmax, entropy, mask, divide."""
    p_RV = torch.softmax(logits_RV, dim=-1)
    floor_R1 = 0.03 * p_RV.amax(dim=-1, keepdim=True)
    entropy_R1 = -torch.xlogy(p_RV, p_RV).sum(dim=-1, keepdim=True)
    logits_RV.masked_fill_(p_RV < floor_R1, -torch.inf)
    logits_RV.div_(torch.exp((entropy_R1 / (entropy_R1 + 1)) ** 2))


def peer(logits_RV: Tensor) -> None:
    """The most similar project, qr-sampler, with its `edt` strategy: T = base·(H/ln V)^exponent
    within bounds, one row at a time in numpy. It was not on the package index, so this is its
    published formula, without its selection of the token."""
    for row_V in logits_RV:
        z_V = row_V.cpu().numpy()
        below_V = z_V - z_V.max()
        share_V = np.exp(below_V)
        total = float(share_V.sum())
        entropy = math.log(total) - float(np.dot(share_V, below_V)) / total
        temperature = min(max(0.8 * (entropy / math.log(len(z_V))) ** 0.5, 0.1), 2.0)
        row_V.copy_(torch.from_numpy(z_V / np.float32(temperature)))
