"""Start DeepSpeed's engine as beside a GPU, told by a stand-in for accelerate, and print the threads that are left.

tests/programs/threads_of_a_rank.py offload|here
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.deepspeed import DeepSpeed

offload = {"offload_optimizer": {"device": "cpu"}} if sys.argv[1] == "offload" else {}
plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"zero_optimization": {"stage": 2} | offload})
accelerator = SimpleNamespace(
    device=torch.device("cuda"),
    process_index=0,
    num_processes=2,
    is_main_process=True,
    mixed_precision="bf16",
    state=SimpleNamespace(deepspeed_plugin=plugin),
)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
DeepSpeed(accelerator, TrainConfig())
print("THREADS", torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], flush=True)
