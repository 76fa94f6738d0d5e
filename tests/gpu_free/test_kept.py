"""What passes on a CUDA that computes nothing keep for their way back, beside what `minimind-dpo plan` says of it."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_model import VOCAB, tiny_model
from helpers_planning import planned, total

from minimind_dpo.planning.activations import head_logits, kept_activations
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import shape_of

pytestmark = pytest.mark.xdist_group("gpu_free")  # one program takes all passes

PAIRS, PREFIX, REST = 3, 24, 40  # as in `kept.py`
SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
KINDS = ("llama", "qwen3", "mistral_window", "minimind_moe", "qwen3_moe")
RUNS: dict[str, dict[str, Any]] = {
    "bf16": dict(bf16=True),
    "fp32": dict(),
    "bf16 weights": dict(bf16=True, stage=2),
    "bf16 lora": dict(bf16=True, dtype="float32"),
    "bf16 lora, bf16 base": dict(bf16=True),
    "bf16 checkpointing": dict(bf16=True, checkpointing=True),
}
UNKNOWN = (
    ("mistral_window", "fp32"),  # goes through SDPA, whose kernel torch chooses on the device
    ("qwen3_moe", "fp32"),  # fake tensors know the grouped product in bf16 only
    ("qwen3_moe", "bf16 lora"),  # whose experts stay in fp32
)


def run_shape(**options: Any) -> RunShape:
    return planned(pairs=PAIRS, length=PREFIX + REST, prompt_share=PREFIX / (PREFIX + REST), **options)


@pytest.mark.parametrize("way", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_much_is_kept_as_planned(steps: dict[str, dict[str, Any]], kind: str, way: str) -> None:
    """The head's probabilities, of its logits in fp32, among it; under checkpointing with one layer computed again."""
    if (kind, way) in UNKNOWN:
        pytest.skip("not known without a GPU")
    found = steps[f"{kind} keeps in {way}"]
    assert "error" not in found, found["error"]
    shape, run = shape_of(tiny_model(kind, **SHAPE), lora_r=4 if "lora" in way else None), run_shape(**RUNS[way])
    predicted = total(kept_activations(shape, run)) + 4 * run.scored * VOCAB
    assert 0.85 <= predicted / found["kept"] <= 1.15, (predicted, found)


def test_probabilities_are_planned_too() -> None:
    """Among the head's logits, at least."""
    run = run_shape(bf16=True)
    assert total(head_logits(shape_of(tiny_model("llama", **SHAPE)), run)) >= 4 * run.scored * VOCAB
