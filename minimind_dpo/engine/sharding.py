"""Parameters whose values are spread over the ranks (ZeRO stage 3): their whole shape, and gathering them.

Without DeepSpeed every parameter is whole and these functions leave it be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


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
def gathered(parameters: Iterable[Tensor], modify: bool = False) -> Iterator[None]:
    """Gather partitioned parameters on every rank; with `modify` rank 0's changes reach all. Collective."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed  # late: where it is not used, or not installed, no parameter is partitioned

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


@contextmanager
def undivided() -> Iterator[None]:
    """Around loading a model on this rank alone: beside a stage 3 policy transformers would divide it among all."""
    from transformers.integrations import deepspeed as settings  # late: transformers takes seconds

    kept = settings._hf_deepspeed_config_weak_ref
    settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        settings._hf_deepspeed_config_weak_ref = kept
