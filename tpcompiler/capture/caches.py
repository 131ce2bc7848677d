"""Turns off caches of keys and values, which only generation needs, while a model is traced."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def without_caches(model: nn.Module) -> nn.Module:
    """The model, told not to return a cache unless its caller asks for one (Hugging Face's `config.use_cache`).

    Other models may share the configurations, so that one that changes is copied first.
    """
    changed: dict[int, Any] = {}
    for module in model.modules():
        config: Any = vars(module).get("config")
        if getattr(config, "use_cache", None) is True:
            if id(config) not in changed:
                changed[id(config)] = copy.copy(config)
                changed[id(config)].use_cache = False
            module.config = changed[id(config)]
    return model
