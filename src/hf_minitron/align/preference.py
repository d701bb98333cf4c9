"""The distances of reward-aware preference optimization (RPO), on numbers alone.

RPO pulls the implicit reward margin that a policy gives a pair of responses towards the gap between two given rewards,
where DPO pulls it towards infinity (Nemotron-4 340B, arXiv 2406.11704, section 3.3; used by P2, arXiv 2408.11796,
"Instruction tuning").
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Distance = Literal["backward_kl", "forward_kl", "squared"]
DISTANCES: tuple[str, ...] = get_args(Distance)


def rpo_loss(log_ratio_gap: Tensor, reward_gap: Tensor, beta: float, distance: Distance = "backward_kl") -> Tensor:
    """The loss of each pair [pairs], in nats for the two KLs.

    `log_ratio_gap` is Delta = log(pi/pi_ref)(chosen) - log(pi/pi_ref)(rejected), summed over response tokens [pairs];
    `reward_gap` is g = eta * (reward of chosen - reward of rejected) [pairs]. With B(x) the coin that shows heads with
    probability sigmoid(x):

    - `backward_kl`: KL(B(g) || B(beta Delta)), the papers' choice. It tends to DPO's loss as g goes to infinity, and is
      the binary cross-entropy with soft label sigmoid(g) less the label's entropy;
    - `forward_kl`: KL(B(beta Delta) || B(g));
    - `squared`: (beta Delta - g)^2; at g = 1/2 it is beta^2 times IPO's loss without length normalisation.

    All are 0 exactly where beta Delta = g. Computed in fp32, or fp64 if given that.
    """
    margin = beta * (log_ratio_gap if log_ratio_gap.dtype == torch.float64 else log_ratio_gap.float())
    gap = reward_gap.to(margin.dtype)
    match distance:
        case "backward_kl":
            return _coin_kl(gap, margin)
        case "forward_kl":
            return _coin_kl(margin, gap)
        case "squared":
            return (margin - gap).square()
    raise ValueError(f"distance={distance!r} is unknown: use one of {', '.join(DISTANCES)}.")


def _coin_kl(logit: Tensor, other: Tensor) -> Tensor:
    """KL(B(logit) || B(other)): the sum over both sides of p (log p - log q), where 0 log 0 is 0."""
    heads = logit.sigmoid() * (logsigmoid(logit) - logsigmoid(other))
    tails = (-logit).sigmoid() * (logsigmoid(-logit) - logsigmoid(-other))
    return heads + tails
