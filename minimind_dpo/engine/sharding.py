"""DeepSpeed's ZeRO from inside: the part of each parameter a rank holds, and frozen models sharded the same way.

It imports DeepSpeed, which takes seconds, when first asked.
ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig


def is_partitioned(parameter: Tensor) -> bool:
    """Whether a parameter's values are spread over the ranks (stage 3)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_values(tensor: Tensor) -> Tensor:
    """The values that this rank holds."""
    return getattr(tensor, "ds_tensor", tensor)


@contextmanager
def whole(parameters: Iterable[Tensor], modify: bool = False) -> Iterator[None]:
    """Gather partitioned parameters on every rank; with `modify` rank 0's changes reach all. Collective."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def held_part(optimizer: Any, parameter: Any) -> tuple[Tensor, int, int, int] | None:
    """Where DeepSpeed's `optimizer` keeps this rank's fp32 part of a parameter, in every stage and precision.

    Returns:
        The flat tensor that AdamW steps, the offset in it, the first element of the part in the flattened parameter
        and the part's length; None where the rank holds no part.
    """
    if is_partitioned(parameter):
        from deepspeed import comm

        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = comm.get_rank(group=parameter.ds_process_group) * size
        length = min(parameter.ds_numel - start, size)
        return (optimizer.fp32_partitioned_groups_flat[group], offset, start, length) if length > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    part = mapping.lp_fragment_address
    return flat, mapping.hp_fragment_address.start, part.start, part.numel


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


@contextmanager
def loading(plugin: Any, config: dict[str, Any]) -> Iterator[None]:
    """Models that transformers builds meanwhile are partitioned from their first weight on, as `config` says."""
    live = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to the newest one
    try:
        yield
    finally:
        del live
        plugin.set_deepspeed_weakref()


def frozen_engine(scorer: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A stage 3 engine without an optimizer around a frozen scorer."""
    import deepspeed

    mark_expert_blocks(scorer)
    engine, *_ = deepspeed.initialize(model=scorer, config=config)
    engine.eval()
    return engine


def mark_expert_blocks(model: nn.Module) -> None:
    """Have stage 3 gather a block of experts as one.

    Which experts run depends on the data, so ranks would gather in different orders and wait for each other forever.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            set_z3_leaf_module(module, True)
