"""The learning rate as a function of the step."""

from __future__ import annotations

from math import cos, pi, sqrt

from tpcompiler.train.settings import Train


def learning_rate(train: Train, step: int) -> float:
    """The learning rate of the `step`-th optimizer step, counted from 0.

    Linear from lr / warmup to lr over the warm-up, then down to min_lr at `until` by a half cosine or a line, and
    min_lr from there on (Megatron-LM, arXiv 1909.08053, §4: 3,000 steps of warm-up, cosine to 1e-5). `stable` holds lr
    until the last part of the run (warm-up–stable–decay: Hu et al., arXiv 2404.06395, §4); `inverse_sqrt` is the
    Transformer's (Vaswani et al., arXiv 1706.03762, §5.3).
    """
    schedule, peak = train.schedule, train.optimizer.lr
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return peak
    lowest = min(schedule.min_lr, peak)
    if schedule.decay == "inverse_sqrt":
        return max(lowest, peak * sqrt(max(schedule.warmup, 1) / (step + 1)))
    end, start = schedule.until or train.steps, schedule.warmup
    if schedule.decay == "stable":
        start = max(start, min(end - 1, round(end * (1 - schedule.cooldown))))
    done = min(1.0, max(0.0, (step - start) / (end - start)))
    left = (1 + cos(pi * done)) / 2 if schedule.decay == "cosine" else 1 - done
    return lowest + (peak - lowest) * left
