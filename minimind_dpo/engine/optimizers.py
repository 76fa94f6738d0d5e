"""The optimizers that `optim` names, and what each of them keeps of a parameter.

name                 of a parameter of n elements, beside its gradient
adamw                two fp32 moments: torch's, fused (Loshchilov and Hutter 2019, arXiv:1711.05101)
adamw_8bit           both moments in 8 bits, in blocks of 256 with an fp32 scale; fp32 below 4096 elements
                     (Dettmers et al. 2022, arXiv:2110.02861)
paged_adamw_8bit     the same, in memory that moves to the host where a GPU is full
adafactor            of a matrix the mean squares of its rows and columns, else of each element
                     (Shazeer and Stern 2018, arXiv:1804.04235, without relative steps and parameter scaling)
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_dpo.errors import UserError

BETAS = (0.9, 0.999)
# What must come back for a run to go on as it was. The rest of a state is the step count, or constants.
_KEPT = (
    *("exp_avg", "exp_avg_sq"),  # AdamW; of Adafactor the second, where it does not factor
    *("state1", "absmax1", "state2", "absmax2"),  # bitsandbytes
    *("exp_avg_sq_row", "exp_avg_sq_col"),  # Adafactor
    "reference",  # a reference that follows the policy, beside any of them
)


def make_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, optim: str = "adamw"
) -> Optimizer:
    """An optimizer of one group, with betas (0.9, 0.999) and decoupled decay on every parameter, as in MiniMind.

    Raises:
        UserError: it is one of bitsandbytes', which is not installed.
    """
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if optim == "adamw":
        return torch.optim.AdamW(parameters, betas=BETAS, fused=True, **common)
    if optim == "adafactor":
        from transformers.optimization import Adafactor  # late: engines know no transformers else

        return Adafactor(parameters, scale_parameter=False, relative_step=False, **common)
    optimizers = bitsandbytes(f"optim: {optim}").optim
    kind = optimizers.PagedAdamW8bit if optim == "paged_adamw_8bit" else optimizers.AdamW8bit
    return kind(parameters, betas=BETAS, **common)


def bitsandbytes(setting: str) -> Any:
    """The package, for a `setting` that needs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        version("bitsandbytes")
        import bitsandbytes  # late: optional, and it takes a second
    except (PackageNotFoundError, ImportError) as error:
        raise UserError(f"{setting} needs bitsandbytes: pip install 'minimind-dpo[quant]' ({error})") from None
    return bitsandbytes


def kept_states(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps of a parameter, made as it makes it where it has taken no step yet."""
    state = optimizer.state[parameter]
    if not any(kind in state for kind in _KEPT):
        _begin(optimizer, parameter, state)
    return {kind: state[kind] for kind in _KEPT if kind in state}


def keep_reference(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Begin a state "reference" of each parameter with the parameter's values, fp32."""
    for parameter in parameters:
        kept_states(optimizer, parameter)
        optimizer.state[parameter]["reference"] = parameter.detach().clone()


@torch.no_grad()
def move_reference(optimizer: Optimizer, parameters: Iterable[Tensor], share: float) -> None:
    """Move each "reference" by a `share` of its way to the parameter: (1 - share) reference + share parameter."""
    for parameter in parameters:
        optimizer.state[parameter]["reference"].lerp_(parameter.data, share)


def _begin(optimizer: Any, parameter: Tensor, state: dict[str, Any]) -> None:
    if hasattr(optimizer, "init_state"):  # bitsandbytes'
        (group,) = optimizer.param_groups
        place = next(index for index, other in enumerate(group["params"]) if other is parameter)
        optimizer.init_state(group, parameter, 0, place)
    elif "scale_parameter" in optimizer.defaults:  # Adafactor's
        state.update(step=0, RMS=0)
        if parameter.dim() < 2:
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        else:
            state["exp_avg_sq_row"] = parameter.new_zeros(parameter.shape[:-1])
            state["exp_avg_sq_col"] = parameter.new_zeros(parameter.shape[:-2] + parameter.shape[-1:])
    else:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")})


def step_count(optimizer: Optimizer) -> float:
    """Steps that an optimizer has taken, the same for every parameter."""
    return max((float(state["step"]) for state in optimizer.state.values()), default=0.0)


def set_step_count(optimizer: Optimizer, steps: float) -> None:
    """Undo `step_count`, once every parameter has its states again."""
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = int(steps)


def skips_not_finite(optimizer: Optimizer) -> bool:
    """Whether an optimizer's own kernel takes no step where its `found_inf` says so, without the host's knowing."""
    return bool(optimizer.defaults.get("fused"))
