"""A baseline's predictions on the disk, for where it cannot be in memory beside the model that is compared with it.

All logits of a text would take gigabytes. Kept of each token is the head of the distribution, its TOP most probable
tokens, exactly; and of the tail that is left, its probability T and SAMPLES tokens drawn from it in proportion to p.
With the model's q, of which nothing is left out,

    KL(p || q) = sum_head (p (log p - log q) + q - p) + T E[r - 1 - log r],    r = q / p

with E the expectation over the tail, for which the mean of the samples stands. (Head and tail together, sum q - p is 0;
putting it in makes every sample a small positive number, where log p - log q is of either sign and ten times as large:
http://joschu.net/blog/kl-approx.html, the estimator k3.) The estimate is right on average. The samples' own variance
s^2 makes that of a token's KL T^2 s^2 / SAMPLES, and as draws are independent, the mean over N tokens is off by a
standard deviation of sqrt(sum of variances) / N; see statistics.summarize for the bound that is drawn from it.
"""

import torch
from torch import Tensor, nn

from .protocols import Window
from .scores import Scores, best, logits, pick, rows

Prediction = dict[str, Tensor]
TOP, SAMPLES = 256, 64


def bytes_per_token() -> int:
    """What the disk holds for each scored token: a token id and a log-probability of each, and three numbers."""
    return 8 * (TOP + SAMPLES) + 12


@torch.inference_mode()
def predict(model: nn.Module, window: Window, seed: int) -> Prediction:
    """What is kept of a causal LM's predictions of a window's targets.

    Returns:
        "nll", float32 [targets]; "best", int32 [targets], the token ranked first; "top" and "samples", int32
        [targets, k], token ids; "top_log" and "sample_log", float32 [targets, k], their log-probabilities; "tail",
        float32 [targets], the probability of all that is not in the head.
    """
    generator = torch.Generator(window.ids.device).manual_seed(seed)
    parts = []
    for some, targets in rows(logits(model, window), window.targets):
        p, total, token = best(some)
        top = p.topk(min(TOP, p.shape[-1]), -1).indices
        tail = p.scatter(-1, top, 0.0)
        mass = tail.sum(-1)
        # of an empty tail anything may be drawn: it counts with probability 0
        drawn = torch.where(mass.unsqueeze(-1) > 0, tail, 1.0).multinomial(SAMPLES, True, generator=generator)
        parts.append(
            {
                "nll": total - pick(some, targets),
                "best": token.int(),  # of equals, topk need not put the same one first
                "top": top.int(),
                "top_log": some.gather(-1, top) - total.unsqueeze(-1),
                "samples": drawn.int(),
                "sample_log": some.gather(-1, drawn) - total.unsqueeze(-1),
                "tail": mass,
            }
        )
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


@torch.inference_mode()
def compare(prediction: Prediction, model: nn.Module, window: Window) -> Scores:
    """As quality.compare, of one window, the baseline's part from the disk; and "kl_variance", float32 [targets]."""
    kept = {name: tensor.to(window.ids.device) for name, tensor in prediction.items()}
    names, parts = list(kept), []
    for some, targets, *stored in rows(logits(model, window), window.targets, *kept.values()):
        base = dict(zip(names, stored))
        _, total, token = best(some)
        own_log = some.gather(-1, base["top"].long()) - total.unsqueeze(-1)
        p, tail = base["top_log"].exp(), base["tail"]
        head = torch.where(p > 0, p * (base["top_log"] - own_log), 0.0) + own_log.exp() - p
        gap = some.gather(-1, base["samples"].long()) - total.unsqueeze(-1) - base["sample_log"]
        sampled = gap.exp() - 1 - gap
        parts.append(
            {
                "baseline_nll": base["nll"],
                "nll": total - pick(some, targets),
                "kl": head.sum(-1) + torch.where(tail > 0, tail * sampled.mean(-1), 0.0),
                "same": base["best"] == token,
                "kl_variance": torch.where(tail > 0, tail.square() * sampled.var(-1) / SAMPLES, 0.0),
            }
        )
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
