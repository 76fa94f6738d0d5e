"""Direct Preference Optimization for MiniMind and any causal language model."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# what is public, and the module it is imported from when it is asked for: `import minimind_dpo` stays fast
_PUBLIC = {
    "Callback": "minimind_dpo.training.callbacks",
    "PairScorer": "minimind_dpo.objective.scoring",
    "TrainConfig": "minimind_dpo.config",
    "load_model": "minimind_dpo.models.loading",
    "pack_pairs": "minimind_dpo.data.batch",
    "plot_run": "minimind_dpo.report.figure",
    "train_dpo": "minimind_dpo.train",
}
__all__ = ["Callback", "PairScorer", "TrainConfig", "__version__", "load_model", "pack_pairs", "plot_run", "train_dpo"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'minimind_dpo' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
