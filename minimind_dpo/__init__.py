"""Direct Preference Optimization for MiniMind and any causal language model."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: `import minimind_dpo` stays fast."""
    if name == "load_model":
        from minimind_dpo.models.loading import load_model

        return load_model
    raise AttributeError(f"module 'minimind_dpo' has no attribute {name!r}")
