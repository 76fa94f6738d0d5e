"""Every setting of a run: what there is (`settings.py`), how it is told (`reading.py`)."""

from minimind_dpo.config.data import read_columns
from minimind_dpo.config.reading import load_config, make_config, save_config
from minimind_dpo.config.settings import (
    BAD_ROW_POLICIES,
    COMPLETION_MASKS,
    DTYPES,
    FROZEN_DTYPES,
    LR_SCHEDULER_TYPES,
    OPTIMIZERS,
    QUANTIZATIONS,
    REFERENCES,
    TEMPLATE_DATE,
    TrainConfig,
    as_told,
    identity,
)

__all__ = [
    "BAD_ROW_POLICIES",
    "COMPLETION_MASKS",
    "DTYPES",
    "FROZEN_DTYPES",
    "LR_SCHEDULER_TYPES",
    "OPTIMIZERS",
    "QUANTIZATIONS",
    "REFERENCES",
    "TEMPLATE_DATE",
    "TrainConfig",
    "as_told",
    "identity",
    "load_config",
    "make_config",
    "read_columns",
    "save_config",
]
