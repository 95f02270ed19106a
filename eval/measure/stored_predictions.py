"""A baseline's predictions on the disk, for a baseline that does not fit into memory beside the quantized model.

All logits of a text would take gigabytes. For each token we store the head of the distribution exactly: its TOP most
probable tokens. The rest is the tail: we store its total probability T, and SAMPLES tokens drawn from it in proportion
to p. The model's own probabilities q are complete. Then

    KL(p || q) = sum_head (p (log p - log q) + q - p) + T E[r - 1 - log r],    r = q / p

where E is the expectation over the tail; the mean of the samples estimates it. (The sum of q - p over head and tail is
0. Adding it makes every sample a small positive number; log p - log q alone has either sign and is ten times as large:
http://joschu.net/blog/kl-approx.html, the estimator k3.) The estimate is right on average. If the samples have the
variance s^2, the KL of a token has the variance T^2 s^2 / SAMPLES. The draws are independent, so the mean over N tokens
has a standard deviation of sqrt(sum of variances) / N. statistics.summarize computes a bound from it.
"""

import torch
from torch import Tensor, nn

from .protocols import Window
from .scores import Scores, best, logits, pick, rows

Prediction = dict[str, Tensor]
TOP, SAMPLES = 256, 64


def bytes_per_token() -> int:
    """Bytes on the disk for each scored token: ids and log-probabilities of head and samples, and three numbers."""
    return 8 * (TOP + SAMPLES) + 12


@torch.inference_mode()
def predict(model: nn.Module, window: Window, seed: int) -> Prediction:
    """The part of a causal LM's predictions of a window's targets that is stored.

    Returns:
        "nll", float32 [targets]; "best", int32 [targets], the token ranked first; "top" and "samples", int32
        [targets, k], token ids; "top_log" and "sample_log", float32 [targets, k], their log-probabilities; "tail",
        float32 [targets], the probability of all tokens that are not in the head.
    """
    generator = torch.Generator(window.ids.device).manual_seed(seed)
    parts = []
    for some, targets in rows(logits(model, window), window.targets):
        p, total, token = best(some)
        top = p.topk(min(TOP, p.shape[-1]), -1).indices
        tail = p.scatter(-1, top, 0.0)
        mass = tail.sum(-1)
        # from an empty tail any token may be drawn: it counts with probability 0
        drawn = torch.where(mass.unsqueeze(-1) > 0, tail, 1.0).multinomial(SAMPLES, True, generator=generator)
        parts.append(
            {
                "nll": total - pick(some, targets),
                "best": token.int(),  # topk may put another one of equal tokens first
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
    """scores.compare for one window, with the baseline from the disk; and "kl_variance", float32 [targets]."""
    on_device = {name: tensor.to(window.ids.device) for name, tensor in prediction.items()}
    names, parts = list(on_device), []
    for some, targets, *stored in rows(logits(model, window), window.targets, *on_device.values()):
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
