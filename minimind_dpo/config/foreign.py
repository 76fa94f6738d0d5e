"""Settings of TRL, transformers, MiniMind and accelerate by their names there: what each is called here.

A name that is one of our own settings means that, whatever stands here. `minimind_dpo/config/from_trl.py` translates
whole configurations of TRL by the same table; a test holds it against TRL's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from minimind_dpo.config.launcher_flags import SWITCHES, VALUES

# theirs -> ours, or ours with a value
RENAMED = {
    # MiniMind
    "from_weight": "model_name_or_path",
    "data_path": "train_data",
    "max_seq_len": "max_length",
    "save_dir": "output_dir",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "grad_clip": "max_grad_norm",
    "log_interval": "logging_steps",
    "save_interval": "save_steps",
    "from_resume": "resume",
    "use_wandb": "report_to",
    "wandb_project": "project",
    # TRL and transformers
    "dataset_name": "train_data",
    "dataset_config": "train_data: owner/name/config",
    "dataset_train_split": "train_data: owner/name:split",
    "dataset_test_split": "eval_data: owner/name:split",
    "train_file": "train_data",
    "eval_dataset": "eval_data",
    "train_dataset": "train_data",
    "ref_model": "ref_model_name_or_path",
    "model_revision": "model_name_or_path, with the path of a downloaded snapshot",
    "lr": "learning_rate",
    "warmup_steps": "warmup_ratio, a share of the steps",
    "disable_dropout": "dropout",
    "max_prompt_length": "max_length, of both together",
    "precompute_ref_log_probs": "reference: cache",
    "resume_from_checkpoint": "resume",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "eval_on_start": "eval_data, which is always evaluated before the first step",
    "save_strategy": "save_steps, 0 for no",
    "full_determinism": "deterministic",
    "use_compile": "torch_compile",
    "activation_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "per_device_eval_batch_size": "per_device_train_batch_size, for evaluations too",
    "auto_find_batch_size": "max_tokens_per_micro_batch, which minimind-dpo plan finds",
    "group_by_length": "max_tokens_per_micro_batch",
    "train_sampling_strategy": "shuffle: false for sequential",
    "use_peft": "lora_r, the rank of LoRA's matrices, with lora_alpha",
    "lora_target_parameters": "lora_target_modules",
    "load_in_4bit": "quantization: nf4, with lora_r",
    "bnb_4bit_quant_type": "quantization: nf4",
    "torch_dtype": "dtype, of a LoRA base; of products --mixed_precision",
    "model_init_kwargs": "dtype, attn_implementation, trust_remote_code",
    "rpo_alpha": "loss_type: sigmoid sft, with loss_weights",
}
# theirs -> what the launcher is told
LAUNCHED = {
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
    "device": "--accelerate_config single_gpu, single_cpu, ...",
    "use_cpu": "--accelerate_config single_cpu",
    "deepspeed": "--accelerate_config ds_zero2 (ds_zero1, ds_zero3, ...)",
    "config_file": "--accelerate_config",
    "local_rank": "--num_processes",
    "nproc_per_node": "--num_processes",
    "ddp_backend": "--accelerate_config",
    "accelerator_config": "--accelerate_config",
} | {name: f"--{name}" for name in (VALUES | SWITCHES)}


def _names(**reasons: str) -> dict[str, str]:
    return {name: _REASONS[reason] for reason, names in reasons.items() for name in names.split()}


_REASONS = {
    "shape": "read off the weights; the heads of generation 2 are --num_attention_heads",
    "fixed": "AdamW's betas are 0.9 and 0.999, its epsilon 1e-8, and every trained parameter is in it",
    "exact": "nothing to choose: losses and metrics are exact means over the pairs of a step, of all ranks",
    "padless": "nothing is padded: pairs are packed into one row",
    "workers": "tokens are prepared once and memory-mapped; processes that lay out batches are dataloader_num_workers",
    "ranks": "decided here: what ranks exchange, and how",
    "half": "metrics and log-probabilities are fp32 whatever the products are",
    "speed": "not here; what makes steps fast is on already (docs/performance.md)",
    "hub": "not a setting here: minimind-dpo export --push_to_hub REPO",
    "log": "decided here: the console, metrics.jsonl and report.html (docs/training.md)",
    "kept": "a checkpoint always has all that a resume needs; the model alone is in model/",
    "absent": "there is nothing like it here",
    "mode": "the verb says it: train, precompute, ...",
    "engines": "one process, DDP and DeepSpeed are there (docs/engines.md)",
    "text": "not here: answers are text only, and cut on the right",
}
# theirs -> why there is none
ABSENT = _names(
    shape="hidden_size num_hidden_layers use_moe",
    fixed="adam_beta1 adam_beta2 adam_epsilon optim_args optim_target_modules lr_scheduler_kwargs",
    exact="average_tokens_across_devices label_smoothing_factor logging_nan_inf_filter dataloader_drop_last "
    "ignore_data_skip prediction_loss_only data_seed",
    padless="padding_free pad_to_multiple_of length_column_name pad_token padding_value label_pad_token_id",
    workers="num_workers dataset_num_proc dataloader_pin_memory dataloader_persistent_workers dataset_streaming "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order precompute_ref_batch_size",
    ranks="ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ignore_bias_buffers",
    half="bf16_full_eval fp16_full_eval tf32",
    speed="torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config "
    "activation_offloading torch_empty_cache_steps use_cache",
    hub="push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    log="logging_strategy logging_first_step log_on_each_node log_level log_level_replica disable_tqdm debug "
    "include_num_input_tokens_seen trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics "
    "include_for_metrics save_weight",
    kept="save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint",
    absent="neftune_noise_alpha eval_delay eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "batch_eval_metrics remove_unused_columns label_names router_aux_loss_coef lora_modules_to_save lora_task_type "
    "load_in_8bit use_bnb_nested_quant bnb_4bit_quant_storage",
    mode="do_train do_eval do_predict",
    engines="fsdp fsdp_config parallelism_config",
    text="truncation_mode tools max_completion_length",
)


def unknown(name: str, ours: Collection[str], in_file: bool = False) -> str:
    """What to say of a name that is none of `ours`: what it is here if it is another tool's, else the nearest.

    Args:
        name: without dashes.
        ours: every name there is.
        in_file: it is a key of the yaml file, where the launcher's flags have no place.
    """
    if name in RENAMED:
        return f"here it is {RENAMED[name]}"
    if name in LAUNCHED:
        where = ": write it on the command line, it is no key of this file" if in_file else ""
        return f"is the launcher's business: {LAUNCHED[name]}{where}"
    if name in ABSENT:
        return f"has no counterpart here: {ABSENT[name]}"
    close = difflib.get_close_matches(name, ours, n=1, cutoff=0.7)
    return "unknown key" + (f"; did you mean {close[0]}?" if close else "; see minimind-dpo train --help")
