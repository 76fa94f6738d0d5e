"""DeepSpeed on one rank, ZeRO 1 to 3 and both offloads, by the real command: it trains as one process does."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu_check.demo import LN2, NOISE, command, end_of, losses
from benchmarks.gpu_check.notes import Notes, Place

STAGES = ("ds_zero1", "ds_zero2", "ds_zero2_offload", "ds_zero3", "ds_zero3_offload")
AT_ONCE = 3  # runs so small share a GPU
STEPS = 6
APART = 0.05  # of a loss: under DeepSpeed what flows between layers is bf16 too


def run(notes: Notes, place: Place) -> None:
    """Each configuration beside that of one process."""
    names = ["single_cpu", "ds_zero2_cpu"] if place.rehearses else ["single_gpu", *STAGES]

    def train(name: str) -> subprocess.CompletedProcess[str]:
        launcher = ["--config_file", f"configs/accelerate/{name}.yaml", "--num_processes", "1"]
        launcher += ["--main_process_port", "0"]
        words = command(place.scratch / name, *launcher, reference="live", max_steps=STEPS)
        return subprocess.run(words, capture_output=True, text=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = dict(zip(names, pool.map(train, names), strict=True))
    found = {}
    for name, result in results.items():
        notes.check(f"{name} trains", result.returncode == 0, end_of(result) if result.returncode else None)
        if not result.returncode:
            found[name] = losses(place.scratch / name)
            notes.close(f"{name}: loss at step 1", found[name][0], LN2, NOISE["bf16"])
    for name in names[1:]:
        if {names[0], name} <= found.keys():
            notes.close(f"{name} ends as {names[0]}", found[name][-1], found[names[0]][-1], APART)
    notes.figure("losses", {name: [round(value, 4) for value in values] for name, values in found.items()})
