"""The settings of a training run: one dataclass, which says of each setting all there is to know."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minimind_dpo.errors import UserError
from minimind_dpo.losses import LOSSES, own_settings
from minimind_dpo.losses.bounds import DROPOUT, FINITE, MINORITY, NOT_NEGATIVE, POSITIVE, SHARE, STEPS, Bounds

COMPLETION_MASKS = ("all_assistant", "final_turn")
# Today's date for chat templates that write one: the same data must not differ from day to day.
TEMPLATE_DATE = "2024-07-26"
BAD_ROW_POLICIES = ("auto", "fail", "drop")
REFERENCES = ("auto", "live", "offload", "cache", "adapter")
LR_SCHEDULER_TYPES = ("minimind", "cosine", "cosine_with_min_lr", "linear", "constant", "constant_with_warmup")
WEIGHT_ROUNDINGS = ("auto", "dithered", "stochastic", "nearest")
MATMULS = ("auto", "torch", "onednn")
DTYPES = ("float32", "float16", "bfloat16")  # torch's names
ON_NONFINITE = ("stop", "skip")
QUANTIZATIONS = ("none", "nf4")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor")  # transformers' names where it has them
FROZEN_DTYPES = ("auto", "float32", "bfloat16", "float16")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")  # TRL's names


def _setting(
    default: Any, help: str, identity: bool, *, bounds: Bounds | None = None, choices: Collection[str] = ()
) -> Any:
    metadata = {"help": help, "identity": identity, "bounds": bounds, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _fixed(default: Any, help: str, **limits: Any) -> Any:
    """A setting that stays what it is as long as a run lasts: with another value, a resume is refused."""
    return _setting(default, help, True, **limits)


def _free(default: Any, help: str, **limits: Any) -> Any:
    """A setting that a resume may change; where numbers depend on it, what it leads to is compared: data, reference."""
    return _setting(default, help, False, **limits)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run is told, under Hugging Face's names; a batch counts pairs.

    The defaults are TRL's DPO settings, with a cosine and a warmup; MiniMind's own are in its recipes, configs/dpo.
    What the launcher decides (processes, mixed precision, ZeRO) is not repeated here: it stays in the accelerate
    configuration.
    """

    model_name_or_path: str = _free("", "policy start: directory, hub id, run directory or MiniMind .pth")
    ref_model_name_or_path: str | None = _free(None, "reference model (default: the policy's start)")
    tokenizer_name_or_path: str | None = _free(None, "tokenizer directory, .gguf file or hub id (default: the model's)")
    num_attention_heads: int | None = _free(None, "query heads of MiniMind raw weights (default 8)", bounds=POSITIVE)
    ref_num_attention_heads: int | None = _free(
        None,
        "query heads of a reference of raw weights (default: the policy's if it is as wide, else 8)",
        bounds=POSITIVE,
    )
    trust_remote_code: bool = _free(False, "run code that comes with a hub model")
    attn_implementation: str = _free(
        "pairs", "pairs: packed shared-prefix batches; sdpa, eager, ...: one padded row a side"
    )
    matmul: str = _fixed(
        "auto",
        "library for fp32 products on the CPU: auto: the faster one, kept on a resume | torch | onednn",
        choices=MATMULS,
    )
    torch_compile: bool = _fixed(False, "compile the decoder for training passes over packed pairs, with torch.compile")
    gradient_checkpointing: bool = _free(False, "recompute activations in the backward pass")
    dropout: float = _fixed(0.0, "the policy's dropout, whatever its configuration says", bounds=DROPOUT)
    weight_rounding: str = _fixed(
        "auto",
        "how fp32 weights become those of half-precision products: " + " | ".join(WEIGHT_ROUNDINGS),
        choices=WEIGHT_ROUNDINGS,
    )
    dtype: str = _free(
        "auto",
        "type of a LoRA base's weights (auto: the type of the run's products): " + " | ".join(FROZEN_DTYPES),
        choices=FROZEN_DTYPES,
    )
    ref_dtype: str = _free(
        "auto",
        "type of a reference model's weights (auto: as the policy's start): " + " | ".join(FROZEN_DTYPES),
        choices=FROZEN_DTYPES,
    )
    quantization: str = _fixed(
        "none", "a LoRA base's linear layers in 4 bits (QLoRA): " + " | ".join(QUANTIZATIONS), choices=QUANTIZATIONS
    )
    lora_r: int | None = _fixed(None, "rank of LoRA matrices; without it every weight is trained", bounds=POSITIVE)
    lora_alpha: float = _fixed(16, "LoRA's product is scaled by lora_alpha / lora_r", bounds=POSITIVE)
    lora_dropout: float = _fixed(0.0, "dropout before LoRA's matrices", bounds=DROPOUT)
    lora_target_modules: list[str] = _fixed(
        [], "ends of the names of the adapted layers (default: all linear layers except the output layer)"
    )
    use_dora: bool = _fixed(False, "LoRA that trains the length of each weight's rows apart from their direction")
    use_rslora: bool = _fixed(False, "LoRA's product is scaled by lora_alpha / sqrt(lora_r) instead")

    train_data: list[str | dict[str, Any]] = _free(
        [], "preference pairs: files, globs, folders, hub ids owner/name[/config][@revision][:split]; {path, weight}"
    )
    eval_data: list[str] = _free([], "held-out pairs, in the same forms; name=DATA each for several sets")
    eval_split: float | None = _fixed(
        None, "held out of train_data by a hash of the prompt: a share below 1, or a number of pairs", bounds=POSITIVE
    )
    columns: list[str] = _free([], "columns under other names: prompt=question,chosen=good,rejected=bad")
    template_date: str = _fixed(TEMPLATE_DATE, "what a chat template takes for today, YYYY-MM-DD")
    max_length: int = _free(1024, "tokens a side, truncated on the right", bounds=POSITIVE)
    completion_mask: str = _free(
        "final_turn", "tokens that count: " + " | ".join(COMPLETION_MASKS), choices=COMPLETION_MASKS
    )
    on_bad_row: str = _free(
        "auto",
        "auto: malformed rows fail, pairs without signal are dropped and counted; fail | drop: both",
        choices=BAD_ROW_POLICIES,
    )
    shuffle: bool = _fixed(True, "a new order each epoch; false keeps file order")

    loss_type: list[str] = _fixed(["sigmoid"], "one or several of docs/losses.md", choices=LOSSES)
    loss_weights: list[float] = _fixed([], "of each of several loss_type, whose weighted sum is the loss (default: 1)")
    beta: float = _fixed(0.1, "strength of the pull towards the reference", bounds=POSITIVE)
    label_smoothing: float = _fixed(0.0, "assumed share of flipped preferences, in [0, 0.5)", bounds=MINORITY)
    f_divergence_type: str = _fixed(
        "reverse_kl", "that the policy is held to the reference by: " + " | ".join(F_DIVERGENCES), choices=F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = _fixed(0.5, "alpha of alpha_divergence", bounds=FINITE)
    ld_alpha: float | None = _fixed(
        None, "LD-DPO: weight of the tokens by which an answer is longer than its rival (default: 1)", bounds=SHARE
    )
    use_weighting: bool = _fixed(False, "WPO: pairs weigh as much as the policy would say them itself")
    loss_settings: dict[str, float] = _fixed(
        {}, "in Python: settings of the losses' own by name; elsewhere keys and flags"
    )
    reference: str = _free(
        "auto", "where reference log-probabilities come from: " + " | ".join(REFERENCES), choices=REFERENCES
    )

    sync_ref_model: bool = _fixed(False, "TR-DPO: the reference follows the policy")
    ref_model_mixup_alpha: float = _fixed(
        0.6,
        "how far it comes each time: 1 makes it the policy",
        bounds=Bounds("in (0, 1]", lambda share: 0 < share <= 1),
    )
    ref_model_sync_steps: int = _fixed(512, "optimizer steps between its moves", bounds=POSITIVE)

    output_dir: str = _free("runs/dpo", "the run directory")
    num_train_epochs: float = _free(1.0, "passes over the training pairs", bounds=POSITIVE)
    max_steps: int = _free(-1, "optimizer steps; -1: as many as num_train_epochs has", bounds=STEPS)
    per_device_train_batch_size: int = _free(4, "pairs a micro-batch on each rank", bounds=POSITIVE)
    gradient_accumulation_steps: int = _free(1, "micro-batches an optimizer step", bounds=POSITIVE)
    max_tokens_per_micro_batch: int | None = _free(
        None, "input tokens a micro-batch; a step is divided further until each has no more", bounds=POSITIVE
    )
    optim: str = _fixed("adamw", "the optimizer: " + " | ".join(OPTIMIZERS), choices=OPTIMIZERS)
    learning_rate: float = _fixed(1e-6, "peak learning rate of the optimizer; 0 is a dry run", bounds=NOT_NEGATIVE)
    lr_scheduler_type: str = _fixed("cosine", " | ".join(LR_SCHEDULER_TYPES), choices=LR_SCHEDULER_TYPES)
    warmup_ratio: float | None = _fixed(
        None,
        "share of the steps with a linearly rising learning rate (default: 0.1; 0 for minimind and constant)",
        bounds=SHARE,
    )
    weight_decay: float = _fixed(0.01, "decoupled weight decay, on every parameter", bounds=NOT_NEGATIVE)
    max_grad_norm: float = _fixed(1.0, "gradient norm clipping; 0 switches it off", bounds=NOT_NEGATIVE)

    on_nonfinite: str = _free(
        "stop", "a loss or gradient that is not finite: " + " | ".join(ON_NONFINITE) + " the step", choices=ON_NONFINITE
    )
    logging_steps: int = _free(10, "optimizer steps between lines of metrics.jsonl", bounds=POSITIVE)
    eval_steps: int | None = _free(
        None, "optimizer steps between evaluations (always before and after)", bounds=POSITIVE
    )
    generate_prompts: str | None = _free(
        None, "prompts that the policy answers at each evaluation: a file, or a number of held-out pairs of each set"
    )
    max_new_tokens: int = _free(128, "tokens after which such an answer is cut off", bounds=POSITIVE)
    temperature: float = _free(0.0, "of sampling such answers; 0 takes the likeliest tokens", bounds=NOT_NEGATIVE)
    save_steps: int = _free(
        100, "optimizer steps between checkpoints; 0 saves none except on a signal", bounds=NOT_NEGATIVE
    )
    save_total_limit: int = _free(2, "checkpoints kept, the best among them; 0 keeps all", bounds=NOT_NEGATIVE)
    metric_for_best_model: str | None = _free(
        None, "a metric of evaluations, say logps/accuracies: the checkpoint that is best by it is kept"
    )
    greater_is_better: bool | None = _free(None, "whether more of that metric is better (default: unless it is a loss)")
    load_best_model_at_end: bool = _free(False, "model/ is of the best checkpoint (by the loss, if no metric is named)")
    resume: str = _free("auto", "auto: newest complete checkpoint of output_dir | never | PATH of one")
    max_hours: float | None = _free(
        None, "hours after which the run stops with a checkpoint, to be started again", bounds=POSITIVE
    )
    report_to: list[str] = _free([], "none, or trackers: wandb, swanlab, tensorboard, trackio, mlflow, ...")
    project: str | None = _free(None, "where trackers put the run (default: $WANDB_PROJECT, or minimind_dpo)")
    run_name: str | None = _free(None, "name of the run in the trackers")
    run_group: str | None = _free(None, "group of the run in the trackers")
    tags: list[str] = _free([], "tags of the run in the trackers")
    dataloader_num_workers: int | None = _free(
        None, "processes that lay out batches ahead; by default none on a CPU, 2 beside a GPU", bounds=NOT_NEGATIVE
    )
    ddp_timeout: int = _free(1800, "seconds that a rank waits for another before the run fails", bounds=POSITIVE)
    seed: int = _fixed(42, "seed of the order and of dropout", bounds=NOT_NEGATIVE)
    deterministic: bool = _fixed(False, "the same bits every time on a GPU too, by operations that may be slower")

    @property
    def attends_pairs(self) -> bool:
        """Whether the packed shared-prefix layout is asked for."""
        return self.attn_implementation == "pairs"

    @property
    def needs_reference(self) -> bool:
        """Whether any of its losses reads a reference."""
        return any(LOSSES[name].needs_reference for name in self.loss_type)

    @property
    def switches_adapters_off(self) -> bool:
        """Whether the reference is the policy without its LoRA matrices: as told, or as `auto` decides."""
        if self.reference == "auto":
            return self.lora_r is not None and self.ref_model_name_or_path is None
        return self.reference == "adapter"


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that must be equal for one session to continue another's run, by name."""
    fixed = {setting.name: getattr(config, setting.name) for setting in fields(config) if setting.metadata["identity"]}
    return fixed | fixed.pop("loss_settings") | {"loss_type": "+".join(config.loss_type)}


def as_told(config: TrainConfig) -> dict[str, Any]:
    """A configuration as yaml has it: what `make_config` makes the same of; UserError as `told_apart`."""
    return told_apart(asdict(config))


def told_apart(values: Mapping[str, Any]) -> dict[str, Any]:
    """Raw values with each setting of a loss's own under its name, where `loss_settings` has them together.

    Raises:
        UserError: it has something else.
    """
    told = dict(values)
    own = told.pop("loss_settings", {})
    if foreign := own.keys() - own_settings().keys():
        has = ", ".join(own_settings())
        raise UserError(f"loss_settings: {', '.join(sorted(foreign))} belongs to no loss; it has {has}")
    return told | own
