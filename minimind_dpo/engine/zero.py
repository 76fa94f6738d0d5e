"""DeepSpeed's ZeRO from inside: the part of each parameter that a rank holds, and settings of frozen models.

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from deepspeed import comm
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from torch.distributed import distributed_c10d

from minimind_dpo.engine.fragments import HeldPart
from minimind_dpo.engine.sharding import is_partitioned


def held_part(optimizer: Any, parameter: Any) -> HeldPart | None:
    """Where DeepSpeed's `optimizer` keeps this rank's fp32 part of a parameter, in every stage and precision.

    None where the rank holds no part.
    """
    if is_partitioned(parameter):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = comm.get_rank(group=parameter.ds_process_group) * size
        length = min(parameter.ds_numel - start, size)
        return HeldPart(optimizer.fp32_partitioned_groups_flat[group], offset, start, length) if length > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    part = mapping.lp_fragment_address
    return HeldPart(flat, mapping.hp_fragment_address.start, part.start, part.numel)


def refresh_weights(optimizer: Any) -> None:
    """Bring the weights that the forward pass reads in line with the optimizer's fp32 ones. Collective."""
    if not hasattr(optimizer, "fp16_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if persistent := optimizer.persistent_parameters:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def loss_scaler(optimizer: Any) -> dict[str, Any]:
    """The numbers of fp16's loss scaler; live, so that they can be set."""
    return vars(optimizer.loss_scaler) if hasattr(optimizer, "loss_scaler") else {}


def frozen_config(policy_config: dict[str, Any], offload: bool) -> dict[str, Any]:
    """DeepSpeed's settings for a frozen model beside the policy: sharded by stage 3, on the CPU with `offload`.

    With `offload` nothing persists on the device and nothing is fetched ahead, so that it holds a layer at a time.
    """
    zero: dict[str, Any] = {"stage": 3}
    if offload:
        zero |= {
            "offload_param": {"device": "cpu", "pin_memory": torch.accelerator.is_available()},
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        }
    return {"train_micro_batch_size_per_gpu": 1, "steps_per_print": float("inf"), "zero_optimization": zero} | {
        name: {"enabled": policy_config[name]["enabled"]} for name in ("bf16", "fp16") if name in policy_config
    }


def mark_expert_blocks(model: nn.Module) -> None:
    """Have stage 3 gather a block of experts as one.

    Which experts run depends on the data, so ranks would gather in different orders and wait for each other forever.
    """
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            set_z3_leaf_module(module, True)


def limit_waiting(engine: Any, seconds: float) -> None:
    """Have ranks wait for each other in DeepSpeed's own group as long as in the run's.

    It is a copy of the run's that DeepSpeed makes with torch's default, half an hour, and gradients are summed in it: a
    rank that hangs in a step would be waited for that long. torch has no public name for this.
    """
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), engine.seq_data_parallel_group)
