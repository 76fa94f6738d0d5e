"""A run from Python on every rank, with a callback that writes down which rank was told what."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from minimind_dpo import Callback, train_dpo
from minimind_dpo.config import load_config


class Noting(Callback):
    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{os.environ['RANK']} {step}\n")


train_dpo(load_config(sys.argv[2:]), callbacks=[Noting()])
