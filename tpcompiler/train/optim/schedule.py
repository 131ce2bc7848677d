"""The learning rate as a function of the step."""

from __future__ import annotations

from math import cos, pi

from tpcompiler.train.run.config import Train


def learning_rate(train: Train, step: int) -> float:
    """The learning rate of the `step`-th optimizer step, counted from 0.

    Linear from lr / warmup to lr over the warm-up, then down to min_lr at `until` by a half cosine or a line, and
    min_lr from there on (Megatron-LM, arXiv 1909.08053, §4: 3,000 steps of warm-up, cosine to 1e-5).
    """
    schedule, peak = train.schedule, train.optimizer.lr
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.decay == "constant":
        return peak
    lowest = min(schedule.min_lr, peak)
    span = (schedule.until or train.steps) - schedule.warmup
    done = min(1.0, (step - schedule.warmup) / span)
    left = (1 + cos(pi * done)) / 2 if schedule.decay == "cosine" else 1 - done
    return lowest + (peak - lowest) * left
