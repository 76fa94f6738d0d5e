"""The engine that the launcher's environment asks for; the one place that asks which it is."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, parse_flag_from_env

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.cpu import set_up_cpu
from minimind_dpo.engine.devices import grow_segments
from minimind_dpo.engine.plain import Plain
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.trackers import check_trackers
from minimind_dpo.errors import UserError

if TYPE_CHECKING:
    from minimind_dpo.engine.deepspeed import DeepSpeed


def start_engine(config: TrainConfig) -> Engine:
    """Meet the other processes, and get the engine that trains on them.

    On CPUs accelerate has to be told that ranks started by torchrun exchange over gloo: left to itself each would
    believe it is alone. DeepSpeed must not hear of `use_cpu`, which switches it off.

    Raises:
        UserError: accelerate, DeepSpeed and the training configuration contradict each other.
    """
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))
    told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    on_cpu = told_cpu or not torch.accelerator.is_available()
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if uses_deepspeed and told_cpu:
        raise UserError(
            "ACCELERATE_USE_CPU: accelerate leaves DeepSpeed out for it; remove it, and hide GPUs from ranks instead, "
            'as `gpu_ids: "-1,-1"` does in configs/accelerate/ds_*_cpu.yaml'
        )
    if on_cpu:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed warns when it has to find out itself; also beside GPUs
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        group.backend = "gloo"
        if not uses_deepspeed:
            os.environ["ACCELERATE_USE_CPU"] = "true"
    if not on_cpu:
        _check_devices()
        grow_segments()
    engine = _engine_class(uses_deepspeed)
    engine.before_start()
    check_trackers(config.report_to)
    try:
        accelerator = Accelerator(
            kwargs_handlers=[group], log_with=config.report_to or None, project_config=_places(config.output_dir)
        )
    except ValueError as error:
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "no DeepSpeed file")
        raise UserError(f"accelerate's configuration ({file}): {error}") from None
    if accelerator.device.type == "cpu":
        set_up_cpu(accelerator.num_processes)
    return engine(accelerator, config)


def _places(output_dir: str) -> ProjectConfiguration:
    """Where trackers write that take a directory."""
    return ProjectConfiguration(project_dir=output_dir, logging_dir=os.path.join(output_dir, "tensorboard"))


def _engine_class(uses_deepspeed: bool) -> type[Plain] | type[DeepSpeed]:
    """The class that drives the policy; another engine takes its line here."""
    if uses_deepspeed:
        from minimind_dpo.engine.deepspeed import DeepSpeed  # late: it takes seconds, and is for Linux only

        return DeepSpeed
    return Plain


def _check_devices() -> None:
    """Refuse more processes on this machine than it has devices."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > torch.accelerator.device_count():
        raise UserError(
            f"the launcher starts {local_ranks} processes on this machine, which has "
            f"{torch.accelerator.device_count()} GPU(s): say how many with --num_processes"
        )
