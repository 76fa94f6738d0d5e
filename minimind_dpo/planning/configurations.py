"""What accelerate's and DeepSpeed's files in configs/ say, as far as memory depends on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from minimind_dpo.config.shipped import CONFIGS
from minimind_dpo.errors import UserError

# stage and offload of the configurations that are compared; the first that fits is recommended
CONFIGURATIONS = ((0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "all"))
_SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "max_reuse_distance": "stage3_max_reuse_distance",
}


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's `zero_optimization` says; sizes that it leaves out are DeepSpeed's (runtime/zero/config.py).

    Attributes:
        stage: of ZeRO; 0 is one process or DDP, without DeepSpeed.
        offload: what lies in the host's memory: none, optimizer, or all (parameters too).
        overlap_comm: whether a bucket of gradients is exchanged while the next one is filled.
        reduce_bucket_size: elements of gradients that are exchanged at once.
        prefetch_bucket_size: elements of weights that stage 3 gathers ahead of their use.
        max_reuse_distance: elements; stage 3 keeps a gathered weight that is used again within so many.
    """

    stage: int = 0
    offload: str = "none"
    overlap_comm: bool = False
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    max_reuse_distance: int = 1_000_000_000


def configuration_name(stage: int, offload: str, cpu: bool, world: int) -> str:
    """The file of configs/accelerate that is nearest: whatever is offloaded, one configuration a stage does it."""
    if stage == 0:
        return ("multi_" if world > 1 else "single_") + ("cpu" if cpu else "gpu")
    return f"ds_zero{stage}" + ("_offload" if offload != "none" else "") + ("_cpu" if cpu else "")


def read_accelerate(name: str) -> dict[str, Any]:
    """What configs/accelerate/`name`.yaml says."""
    return yaml.safe_load((CONFIGS / "accelerate" / f"{name}.yaml").read_text("utf-8"))


def read_deepspeed(stage: int, offload: str, cpu: bool) -> dict[str, Any]:
    """The DeepSpeed JSON that the nearest configuration names.

    Stage 3 has no configuration that offloads the optimizer alone: its `offload_param` is left out for that.
    """
    launch = read_accelerate(configuration_name(stage, offload, cpu, world=2))
    path = CONFIGS.parent / launch["deepspeed_config"]["deepspeed_config_file"]  # relative to the repository
    settings = json.loads(path.read_text("utf-8"))
    if offload == "optimizer":
        settings["zero_optimization"].pop("offload_param", None)
    return settings


def read_zero(stage: int, offload: str, cpu: bool) -> ZeroSettings:
    """The ZeRO settings of the nearest configuration.

    Raises:
        UserError: a size in DeepSpeed's JSON is no number.
    """
    if stage == 0:
        return ZeroSettings()
    zero = read_deepspeed(stage, offload, cpu)["zero_optimization"]
    sizes = {field: zero[key] for field, key in _SIZES.items() if key in zero}
    for field, size in sizes.items():
        if not isinstance(size, (int, float)):
            name = configuration_name(stage, offload, cpu, world=2)
            raise UserError(f"plan: {name}: {_SIZES[field]} is {size!r}; write the number of elements")
    return ZeroSettings(
        stage=zero["stage"],
        offload="all" if "offload_param" in zero else "optimizer" if "offload_optimizer" in zero else "none",
        overlap_comm=zero.get("overlap_comm", zero["stage"] == 3),
        **{field: int(size) for field, size in sizes.items()},
    )
