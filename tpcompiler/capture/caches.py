"""Caches of keys and values, which serve generation: a model that is trained or evaluated returns none."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def without_caches(model: nn.Module) -> nn.Module:
    """The model, told not to return a cache unless its caller asks for one (Hugging Face's `config.use_cache`).

    Configurations may be shared with other models: those that change are copied.
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
