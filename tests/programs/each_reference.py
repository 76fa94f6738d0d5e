"""`minimind-dpo train` once for each reference mode, one after another in the same processes.

    [accelerate launch ...] tests/programs/each_reference.py OUTPUT_ROOT [train's flags]

The run of a mode goes to OUTPUT_ROOT/MODE; `adapter` trains LoRA matrices.
"""

from __future__ import annotations

import sys

from accelerate import Accelerator

from minimind_dpo.train import main

EXTRA = {"live": [], "cache": [], "offload": [], "adapter": ["--lora_r", "4"]}
root, flags = sys.argv[1], sys.argv[2:]
end_training = Accelerator.end_training
Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # the process group serves all runs
code = 0
for mode, extra in EXTRA.items():
    one = [*flags, "--reference", mode, "--output_dir", f"{root}/{mode}", *extra]
    code = code or main(one)
end_training(Accelerator())
sys.exit(code)
