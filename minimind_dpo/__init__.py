"""Direct Preference Optimization for MiniMind and any causal language model."""

__version__ = "0.1.0"
