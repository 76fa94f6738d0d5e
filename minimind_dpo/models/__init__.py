"""Language models: loading them, the one that is written here, and their router losses."""

from minimind_dpo.models.loading import load_model
from minimind_dpo.models.minimind import MiniMindMoeConfig, MiniMindMoeForCausalLM, MiniMindMoeModel
from minimind_dpo.models.router import RouterSettings, router_aux_loss, router_settings

__all__ = [
    "MiniMindMoeConfig",
    "MiniMindMoeForCausalLM",
    "MiniMindMoeModel",
    "RouterSettings",
    "load_model",
    "router_aux_loss",
    "router_settings",
]
