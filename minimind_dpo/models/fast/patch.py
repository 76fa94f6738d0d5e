"""The one door to the modules of a model: what stands in for their forward passes while a batch is scored.

What gets an autograd node is told by `models/fast/fusing.py`. Everything is an attribute of the model's own
instances, for the time of one batch: classes, Python modules and other models are never touched, and afterwards the
model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from minimind_dpo.models.fast.attention import pair_attention
from minimind_dpo.models.fast.fusing import fused_forwards, widened_forwards
from minimind_dpo.models.fast.half import shadowed
from minimind_dpo.models.fast.head import token_logps, token_logps_and_squares
from minimind_dpo.models.fast.products import ONEDNN, TORCH, linear, linear_forwards
from minimind_dpo.models.fast.rotary import length_dependent, rows_apart

PAIR_ATTENTION = "minimind_dpo_pairs"
PAIR_ATTENTIONS = {TORCH: PAIR_ATTENTION, ONEDNN: f"{PAIR_ATTENTION}_{ONEDNN}"}
for _library, _name in PAIR_ATTENTIONS.items():  # more choices; a model has to name one to get it
    AttentionInterface.register(_name, partial(pair_attention, library=_library))

_ABSENT = object()

Change = tuple[Any, str, Any]  # an object, the name of an attribute, and what it is to be


class Patch:
    """What stands in for a model's own forward passes, to be `applied` to one batch at a time.

    Making one changes nothing, and any number of them may be made for a model.

    Args:
        model: the language model; its modules may later be wrapped by an engine or by accelerate's hooks.
        library: for fp32 products on the CPU (`models/fast/products.py`).

    Attributes:
        decoder: the model without its head.
        head: the output layer, which while the patch is applied can be called as `head(hidden, targets)` for
            log-probabilities. It stays a module that is called once a forward pass: that is where ZeRO-3 gathers its
            weight, on all ranks together. None where it is no plain linear layer.
        length_dependent: modules whose rotary frequencies depend on a row's length.
    """

    def __init__(self, model: PreTrainedModel, library: str = TORCH):
        self._model, self._library = model, library
        self._fused = dict([*fused_forwards(model), *linear_forwards(model, library), *widened_forwards(model)])
        configs = {id(config): config for module in model.modules() if (config := _config(module)) is not None}
        self._configs = list(configs.values())
        self._checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        if self.decoder in (None, model) or type(self.head) is not nn.Linear or self.head.bias is not None:
            self.head = None
        layers = getattr(self.decoder, "layers", None)
        self.length_dependent = length_dependent(model)
        self._last_layer = layers[-1] if layers else None
        self._rows = _Rows()
        self._on_rows: dict[nn.Module, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def applied(
        self,
        *,
        packed: bool,
        wanted: Tensor | None = None,
        copies: Mapping[Any, Tensor] = MappingProxyType({}),
        lengths: Sequence[int] = (),
    ) -> AbstractContextManager[None]:
        """Around the forward pass of one batch.

        What activation checkpointing runs again in the backward pass, it runs under the same patch again.

        Args:
            packed: the model's attention is to be that over pairs (`models/fast/attention.py`).
            wanted: [S] ascending positions in the flattened rows whose last hidden states are used; None for all.
            copies: of parameters that products use, which take their places.
            lengths: tokens of each row of a plain batch without its padding.

        Raises:
            NotImplementedError: `packed`, and the model's class has an attention that cannot be exchanged.
        """
        if packed and not self._model._can_set_attn_implementation():
            raise NotImplementedError(f"{type(self._model).__name__} has an attention of its own")
        changes: list[Change] = [
            (module, _forward_name(module), forward) for module, forward in self._fused.items() if _is_own(module)
        ]
        changes += shadowed(self._model, copies)
        for module in self.length_dependent if lengths else ():
            changes.append((module, _forward_name(module), partial(rows_apart, module, _forward(module), lengths)))
        if packed:
            attention = PAIR_ATTENTIONS[self._library]
            changes += [(config, "_attn_implementation_internal", attention) for config in self._configs]
        if wanted is not None and self._last_layer is not None:
            changes += self._restricted(self._last_layer, wanted)
        if self.head is not None:
            changes.append((self.head, _forward_name(self.head), partial(_head, self.head, self._library)))
        return _changed([*changes, *self._checkpointing(changes)])

    def _restricted(self, layer: nn.Module, wanted: Tensor) -> Iterator[Change]:
        """The last layer on the wanted rows only; its attention is told of them by a `wanted_rows` of its own.

        Past the last attention no token looks at another, so rows without a logit are of no use; left out they count
        0. The keys and values of the last layer are made of all rows.
        """
        yield self._rows, "positions", wanted
        if hasattr(layer, "self_attn"):
            yield layer.self_attn, "wanted_rows", wanted
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
            try:
                module = layer.get_submodule(name)
            except AttributeError:
                continue
            forward = self._fused[module] if module in self._fused and _is_own(module) else _forward(module)
            if module not in self._on_rows or self._on_rows[module][0] != forward:
                # kept: to a compiled decoder another object is another program
                self._on_rows[module] = forward, partial(_on_rows, self._rows, forward)
            yield module, _forward_name(module), self._on_rows[module][1]

    def _checkpointing(self, changes: list[Change]) -> Iterator[Change]:
        """Have transformers' activation checkpointing make these changes around whatever it runs again."""
        for module in self._checkpointed:
            if (checkpoint := vars(module).get("_gradient_checkpointing_func")) is not None:
                yield module, "_gradient_checkpointing_func", partial(_checkpoint, checkpoint, changes)


@contextmanager
def _changed(changes: Sequence[Change]) -> Iterator[None]:
    """Objects with other attributes of their own, for the time of the `with`; however it ends."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for target, name, value in changes:
            own: dict[str, Any] = target.__dict__
            before.append((own, name, own.get(name, _ABSENT)))
            own[name] = value
        yield
    finally:
        for own, name, value in reversed(before):
            if value is _ABSENT:
                del own[name]
            else:
                own[name] = value


def _checkpoint(
    checkpoint: Callable[..., Any], changes: Sequence[Change], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """`checkpoint(function, ...)`, where the backward pass sees what the first pass saw."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        with _changed(changes):
            return function(*args, **kwargs)

    return checkpoint(changed, *args, **kwargs)


def _forward_name(module: nn.Module) -> str:
    """Where a module's own forward pass is: accelerate's hooks, which bring offloaded weights, take the usual place."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _forward(module: nn.Module) -> Callable[..., Any]:
    return getattr(module, _forward_name(module))


def _is_own(module: nn.Module) -> bool:
    """Whether a module's forward pass is its class's; else somebody else has replaced it, and meant to."""
    return getattr(_forward(module), "__func__", None) is type(module).forward


def _config(module: nn.Module) -> PreTrainedConfig | None:
    config = vars(module).get("config")
    return config if isinstance(config, PreTrainedConfig) else None


class _Rows:
    """Which rows the last layer is for, while a batch is scored: `positions` [S]."""

    positions: Tensor


def _on_rows(wanted: _Rows, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward` of the wanted rows of x [..., D], 0 elsewhere."""
    positions = wanted.positions
    rows = forward(x.flatten(0, -2)[positions][None])[0]
    output = rows.new_zeros(x.shape[:-1].numel(), rows.shape[-1])
    # unlike index_copy this keeps no copy of `rows` for the backward pass
    return output.index_put((positions,), rows).view(*x.shape[:-1], -1)


def _head(
    self: Any, library: str, hidden: Tensor, targets: Tensor | None = None, squares: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    if targets is None:
        return linear(hidden, self.weight.to(hidden.dtype), None, library)
    return (token_logps_and_squares if squares else token_logps)(hidden, self.weight, targets, library)
