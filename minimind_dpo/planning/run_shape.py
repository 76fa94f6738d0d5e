"""The sizes of a run: ranks, batch and precision, as far as memory depends on them."""

from __future__ import annotations

from dataclasses import dataclass

from minimind_dpo.planning.configurations import ZeroSettings

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class RunShape:
    """What is planned beside the model.

    Attributes:
        world: ranks, `per_node` of them on one machine.
        zero: DeepSpeed's settings; stage 0 is one process or DDP.
        bf16: mixed precision; bf16 weights under DeepSpeed, autocast over fp32 weights without.
        reference: live, offload, cache or adapter; none where no loss reads one.
        loss_type: the losses.
        follows: whether the reference follows the policy (`sync_ref_model`).
        pairs: of a micro-batch on each rank.
        length: tokens a side.
        prompt_share: share of the length that the two sides of a pair have in common.
        checkpointing: whether activations are recomputed in the backward pass.
        cpu: whether the device is the host's own memory.
        dtype: of a LoRA base, as in train.
        ref_dtype: of a reference.
        quantization: of a LoRA base's linear layers.
        optim: the optimizer.
    """

    world: int = 1
    per_node: int = 1
    zero: ZeroSettings = ZeroSettings()
    bf16: bool = False
    reference: str = "cache"
    loss_type: tuple[str, ...] = ("sigmoid",)
    follows: bool = False
    pairs: int = 4
    length: int = 1024
    prompt_share: float = 0.0
    checkpointing: bool = False
    cpu: bool = False
    dtype: str = "auto"
    ref_dtype: str = "auto"
    quantization: str = "none"
    optim: str = "adamw"

    @property
    def stage(self) -> int:
        """Stage of ZeRO, 0 without DeepSpeed."""
        return self.zero.stage

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed steps the optimizer in the host's memory."""
        return self.zero.offload != "none"

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the optimizer's states are in another memory than the device's."""
        return self.offloads and not self.cpu

    @property
    def weights_on_host(self) -> bool:
        """Whether the shares of the weights are in another memory than the device's."""
        return self.zero.offload == "all" and not self.cpu

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are rounded as they are used."""
        return self.bf16 and self.stage == 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of a weight that the forward pass reads: e in the formulas."""
        return 2 if self.bf16 and self.stage else 4

    @property
    def output_bytes(self) -> int:
        """Bytes of an element of what a linear layer puts out: c in the formulas."""
        return 2 if self.bf16 else 4

    @property
    def frozen_bytes(self) -> int:
        """Bytes of an element of a LoRA base without DeepSpeed: b in the formulas."""
        return _BYTES.get(self.dtype, 2 if self.bf16 else 4)

    @property
    def reference_bytes(self) -> int | None:
        """Bytes of an element of a reference that has a type of its own."""
        return _BYTES.get(self.ref_dtype)

    @property
    def prefix(self) -> int:
        """Input tokens that the two sides of a pair share."""
        return int(self.length * self.prompt_share)

    @property
    def branch(self) -> int:
        """Input tokens of one side beyond the shared ones; its last token is a target only."""
        return self.length - 1 - self.prefix

    @property
    def tokens(self) -> int:
        """Input tokens of a packed micro-batch: pairs (prefix + 2 branch)."""
        return self.pairs * (self.prefix + 2 * self.branch)

    @property
    def scored(self) -> int:
        """Tokens that the output layer scores: each after the shared ones, pairs 2 (length - prefix)."""
        return self.pairs * 2 * (self.length - self.prefix)
