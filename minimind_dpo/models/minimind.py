"""MiniMind's generation-2 mixture of experts, the one MiniMind model that transformers has no class for.

It is Llama with another feed-forward block: softmax router, the best 2 of 4 experts with renormalised
weights, and a shared expert that every token passes, added without a gate. Parameter names are MiniMind's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from transformers.utils.output_capturing import OutputRecorder

from minimind_dpo.engine import transfer
from minimind_dpo.models.router import router_aux_loss, router_settings


class MiniMindMoeConfig(LlamaConfig):
    """Llama's configuration plus the experts; the defaults are MiniMind's (its `--use_moe 1`)."""

    model_type = "minimind_moe"
    rms_norm_eps: float = 1e-5
    num_experts: int = 4
    num_experts_per_tok: int = 2
    num_shared_experts: int = 1
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    minimind_generation: int = 2


class MiniMindMoeRouter(nn.Linear):
    """Scores of the routed experts: [tokens, hidden_size] to [tokens, num_experts], before the softmax."""


class MiniMindMoeBlock(nn.Module):
    """The feed-forward block: weighted sum of the chosen experts plus the shared experts.

    Every expert's modules run in every forward pass, an unchosen one on zero tokens: its gradient is then
    zero instead of missing, and all ranks run the same modules, which DDP and ZeRO-3 rely on.

    A CPU gives an expert its own tokens. Which these are a GPU would have to tell the host first, for every expert of
    every layer; there each expert takes all tokens, and those of others count nothing.
    """

    def __init__(self, config: MiniMindMoeConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = MiniMindMoeRouter(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))
        self.shared_experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_shared_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [batch, length, hidden_size] to the same shape; train and eval mode are the same function."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = self.gate(tokens).float().softmax(dim=-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        mixed = (self._mixed_of_all if transfer.on_gpu(tokens) else self._mixed_of_chosen)(tokens, weights, chosen)
        for shared in self.shared_experts:
            mixed = mixed + shared(tokens)
        return mixed.view_as(hidden_states)

    def _mixed_of_chosen(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == index)
            output = expert(tokens[row]) * weights[row, slot, None]
            mixed.index_add_(0, row, output.to(mixed.dtype))
        return mixed

    def _mixed_of_all(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        shares = weights.new_zeros(len(tokens), len(self.experts)).scatter(1, chosen, weights)
        mixed = weights.new_zeros(tokens.shape)
        for index, expert in enumerate(self.experts):
            mixed = torch.addcmul(mixed, expert(tokens), shares[:, index, None])
        return mixed.to(tokens.dtype)


class MiniMindMoeDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around `MiniMindMoeBlock`."""

    def __init__(self, config: MiniMindMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mlp = MiniMindMoeBlock(config)  # type: ignore[assignment]


class MiniMindMoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, save, checkpoint and record this model."""

    config: MiniMindMoeConfig
    config_class = MiniMindMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMindMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(MiniMindMoeRouter, index=0),
        "hidden_states": MiniMindMoeDecoderLayer,
        "attentions": LlamaAttention,
    }


class MiniMindMoeModel(MiniMindMoePreTrainedModel, LlamaModel):  # type: ignore[misc]
    """The decoder stack with Llama's forward pass; extra keyword arguments reach the attention function."""

    def __init__(self, config: MiniMindMoeConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(MiniMindMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class MiniMindMoeForCausalLM(MiniMindMoePreTrainedModel, GenerationMixin):
    """The language model: `MiniMindMoeModel` and an output layer tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindMoeConfig):
        super().__init__(config)
        self.model = MiniMindMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Compute next-token logits.

        Args:
            input_ids: [batch, length] token ids (or `inputs_embeds` [batch, length, hidden_size]).
            attention_mask: [batch, length], 0 on padding.
            position_ids: [batch, length] positions for the rotary embedding; counted from 0 by default.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: see `input_ids`.
            labels: [batch, length] target ids, -100 where none; adds `loss`: mean next-token loss plus `aux_loss`.
            use_cache: return `past_key_values`.
            output_router_logits: return `router_logits`, one [batch * length, num_experts] tensor a layer,
                and `aux_loss`, MiniMind's load-balancing loss with its coefficient, averaged over the rows.
            logits_to_keep: keep the last n positions (0: all) or the positions in an index tensor.
            **kwargs: passed on to the attention function.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        places = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        outputs = self.model(**inputs, **places, output_router_logits=output_router_logits, **kwargs)
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = aux_loss = None
        if output_router_logits:
            aux_loss = self._aux_loss(outputs.router_logits, *hidden_states.shape[:2])
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            loss = loss if aux_loss is None else loss + aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),
        )

    def _aux_loss(self, router_logits: tuple[Tensor, ...], batch: int, length: int) -> Tensor:
        """Mean load-balancing loss of the batch's rows, 0 when its coefficient is."""
        settings = router_settings(self.config)
        if settings is None:
            return router_logits[0].new_zeros(())
        rows = [slice(row * length, (row + 1) * length) for row in range(batch)]
        losses = router_aux_loss(
            router_logits, rows, kind=settings.kind, top_k=settings.top_k, coefficient=settings.coefficient
        )
        return losses.mean()


# So that AutoModelForCausalLM.from_pretrained opens a saved model once this package is imported.
AutoConfig.register(MiniMindMoeConfig.model_type, MiniMindMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniMindMoeConfig, MiniMindMoeForCausalLM, exist_ok=True)
