"""Several processes for one command: `accelerate launch` with the run's own exit code, and verbs that go through it."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """`python -m minimind_dpo.launch`, with the arguments of `accelerate launch`; see `workers.launch`."""
    # late: accelerate takes seconds, and a signal that comes meanwhile ends the command as one that comes later does
    from minimind_dpo.launch.workers import launch

    return launch(argv)
