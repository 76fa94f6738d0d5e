"""What the policy answers while it is trained; nothing of the run notices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from minimind_dpo.data.prompts import Prompt
from minimind_dpo.engine.ranks import stop_together
from minimind_dpo.models.generation import Manner, generate, repetition
from minimind_dpo.training.run import Run

REPLY_VALUES = ("reply", "tokens", "repetition", "ended")  # of each prompt's text


def live_replies(run: Run) -> list[dict[str, Any]]:
    """The policy's replies to the run's prompts as it is now, a dict each. Collective.

    Keys: `step`, `prompt`, `reply`, `tokens` (of the reply), `repetition` (`models/generation.py`) and `ended`, whether
    the policy ended it itself.

    Raises:
        StoppedEarly: a signal to any rank asked for it.
    """
    manner = Manner(
        run.end_token_ids.tolist(),
        run.config.max_new_tokens,
        run.config.temperature,
        hash((run.config.seed, run.state.step)),
    )
    training = run.scorer.training
    run.scorer.eval()
    try:
        check = partial(stop_together, run.engine, run.stop.signalled, "while the policy answered prompts")
        replies = generate(run.engine, run.policy, [prompt.ids for prompt in run.prompts], manner, check)
    finally:
        run.scorer.train(training)
    return [{"step": run.state.step} | told for told in told_replies(run.prompts, replies, run.tokenizer, manner)]


def told_replies(
    prompts: Sequence[Prompt], replies: Sequence[Sequence[int]], tokenizer: Any, manner: Manner
) -> list[dict[str, Any]]:
    """Replies with their prompts as texts, and what can be measured of them."""
    return [
        {
            "prompt": prompt.text,
            "reply": str(tokenizer.decode(reply, skip_special_tokens=True)).strip(),
            "tokens": len(reply),
            "repetition": repetition(reply),
            "ended": bool(reply) and reply[-1] in manner.end_token_ids,
        }
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def reply_metrics(replies: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of what was measured, under `eval_replies/`; nothing of no replies."""
    names = ("tokens", "repetition", "ended") if replies else ()
    return {f"eval_replies/{name}": sum(reply[name] for reply in replies) / len(replies) for name in names}
