"""What a configuration says of its loss: settings of the losses' own, weights, and what of it can't be right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import isfinite, nan
from typing import Any

from minimind_dpo.config.settings import TrainConfig
from minimind_dpo.losses import LOSSES, Loss, own_settings


def to_names(value: Any) -> list[str]:
    """Names, from one text with commas or spaces too."""
    items = value if isinstance(value, list) else [value]
    return [part for item in items for part in str(item).replace(",", " ").split()]


def to_weights(value: Any) -> list[float]:
    """Numbers, from texts too.

    Raises:
        ValueError: one is none, or all are 0.
    """
    try:
        weights = [float(item) for item in to_names(value)]
    except ValueError:
        weights = [nan]
    if not all(isfinite(weight) for weight in weights) or (weights and not any(weights)):
        raise ValueError(f"expected numbers, not all of them 0, as in 1.0 0.2; found {value!r}")
    return weights


def with_loss_settings(config: TrainConfig) -> TrainConfig:
    """The configuration with every setting of its losses' own, and with weights only where they say something."""
    settings = {name: own.default for loss in _known(config).values() for name, own in loss.settings.items()}
    says_nothing = config.loss_weights == [1.0] * len(config.loss_type)
    return dataclasses.replace(
        config, loss_settings=settings | config.loss_settings, loss_weights=[] if says_nothing else config.loss_weights
    )


def _known(config: TrainConfig) -> dict[str, Loss]:
    """The losses that are asked for and there, by name."""
    return {name: LOSSES[name] for name in config.loss_type if name in LOSSES}


def loss_problems(config: TrainConfig) -> Iterator[str]:
    """A message for each setting of the loss that has no meaning beside the others."""
    losses = _known(config)
    if not config.loss_type:
        yield f"loss_type: missing; one or several of {', '.join(LOSSES)}"
    if len(set(config.loss_type)) < len(config.loss_type):
        yield f"loss_type: names a loss twice: {', '.join(config.loss_type)}"
    if config.loss_weights and len(config.loss_weights) != len(config.loss_type):
        yield (
            f"loss_weights: {len(config.loss_weights)} for {len(config.loss_type)} loss_type; give one for each, "
            "in their order"
        )
    if losses:
        yield from _setting_problems(config)
        yield from _divergence_problems(config)
        yield from reference_problems(config)
    if config.use_weighting and (unweighed := [name for name, loss in losses.items() if not loss.weighs_pairs]):
        yield f"use_weighting: pairs have no weight under {', '.join(unweighed)}, which takes them apart; remove one"


def _setting_problems(config: TrainConfig) -> Iterator[str]:
    losses = _known(config)
    smoothed = [name for name, loss in LOSSES.items() if "label_smoothing" in loss.names]
    if config.label_smoothing and losses.keys().isdisjoint(smoothed):
        yield (
            f"label_smoothing: has no meaning for loss_type {', '.join(losses)}; "
            f"use one of {', '.join(smoothed)} or remove it"
        )
    for name, loss in losses.items():
        for setting, bounds in loss.limits.items():
            if not bounds.holds(getattr(config, setting)):
                yield f"{setting}: must be {bounds.says} for loss_type {name}, is {getattr(config, setting)}"
    owners = {setting: name for name, loss in LOSSES.items() for setting in loss.settings}
    yield from _unused(config)
    for name, value in config.loss_settings.items():
        bounds = own_settings()[name].bounds
        if owners[name] not in losses:
            yield f"{name}: belongs to loss_type {owners[name]}, not asked for here; remove it, or ask for that loss"
        elif not bounds.holds(value):
            yield f"{name}: must be {bounds.says}, is {value}"


def _unused(config: TrainConfig) -> Iterator[str]:
    """A message for each setting that another one, left as it is, makes useless."""
    usual = TrainConfig()
    for name, used, owner in (
        (
            "f_alpha_divergence_coef",
            config.f_divergence_type == "alpha_divergence",
            "f_divergence_type: alpha_divergence",
        ),
        ("ref_model_mixup_alpha", config.sync_ref_model, "sync_ref_model: true"),
        ("ref_model_sync_steps", config.sync_ref_model, "sync_ref_model: true"),
        ("ld_alpha", config.loss_type != ["sft"], "another loss_type than sft alone"),
    ):
        if not used and getattr(config, name) != getattr(usual, name):
            yield f"{name}: has a meaning with {owner} only; set that, or remove it"


def _divergence_problems(config: TrainConfig) -> Iterator[str]:
    if config.f_divergence_type == "reverse_kl":
        return
    losses = _known(config)
    able = [name for name, loss in LOSSES.items() if loss.takes_divergences]
    unable = [name for name, loss in losses.items() if loss.reads_more_than_scores]
    if unable or losses.keys().isdisjoint(able):
        yield (
            f"f_divergence_type: {config.f_divergence_type} has no meaning for loss_type "
            f"{', '.join(unable or losses)}; use {', '.join(able)}, or reverse_kl"
        )


def reference_problems(config: TrainConfig) -> Iterator[str]:
    """A message for each setting of a reference that is not there, or can't follow the policy."""
    if config.sync_ref_model:
        yield from _sync_problems(config)
    if not all(name in LOSSES for name in config.loss_type) or config.needs_reference:
        return
    named = ", ".join(config.loss_type)
    for setting, unused in (
        ("ref_model_name_or_path", config.ref_model_name_or_path is None),
        ("ref_dtype", config.ref_dtype == "auto"),
        ("reference", config.reference == "auto"),
    ):
        if not unused:
            yield f"{setting}: loss_type {named} has no reference; remove it"


def _sync_problems(config: TrainConfig) -> Iterator[str]:
    """What a reference that follows the policy can't be: anything but a second model like it, whole and live."""
    for setting, fits, remedy in (
        ("loss_type", config.needs_reference, "has no reference to follow the policy; take one that has"),
        ("lora_r", config.lora_r is None, "trains matrices that the reference has not; remove it"),
        (
            "reference",
            config.reference in ("auto", "live"),
            "does not hold the model that is to follow; set it to live",
        ),
        ("ref_model_name_or_path", config.ref_model_name_or_path is None, "is another model; remove it"),
        ("ref_dtype", config.ref_dtype == "auto", "would round away the small moves; remove it"),
    ):
        if not fits:
            value = getattr(config, setting)
            named = ", ".join(value) if isinstance(value, list) else value
            yield f"sync_ref_model: {setting} {named} {remedy}, or remove sync_ref_model"
