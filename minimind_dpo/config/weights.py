"""Which types of weights go together with the rest of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from minimind_dpo.config.settings import DTYPES, TrainConfig


def weight_problems(config: TrainConfig) -> Iterator[str]:
    """A message for each type of weights that another setting leaves without a meaning."""
    if config.dtype in ("bfloat16", "float16") and config.lora_r is None:
        yield (
            f"dtype: {config.dtype} is for the frozen weights of a LoRA base, and without lora_r every weight is "
            "trained, which takes fp32; the precision of products is the launcher's: --mixed_precision"
        )
    if config.ref_dtype in DTYPES and config.switches_adapters_off:
        yield (
            f"ref_dtype: {config.ref_dtype} is for a reference model of its own, and here the reference is the policy "
            "without its LoRA matrices; remove it, or set reference to live, offload or cache"
        )
    if config.quantization == "nf4":
        yield from _quantization_problems(config)


def _quantization_problems(config: TrainConfig) -> Iterator[str]:
    if config.lora_r is None:
        yield "quantization: nf4 weights can't be trained, only matrices beside them; set lora_r too"
    elif config.ref_model_name_or_path is None:
        own = "the reference is the policy's quantised base"
        if config.ref_dtype in DTYPES and not config.switches_adapters_off:
            yield f"ref_dtype: {own}; remove it, or name ref_model_name_or_path"
        if config.reference == "offload":
            yield f"reference: {own}, whose layers offload can't move; set it to adapter, live or cache"
