"""`minimind-dpo precompute`: fills the reference cache on its own, so that training starts at once.

`python -m minimind_dpo.precompute` equals `minimind-dpo precompute`; both take the flags of `train`.
"""

from __future__ import annotations

import logging
import sys
import time

from accelerate import Accelerator

from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.data.tokenized import load_tokenizer
from minimind_dpo.engine.launcher import freeze, loading_reference, release, scoring_dtype, unwrap
from minimind_dpo.engine.ranks import decide
from minimind_dpo.errors import UserError, exit_code
from minimind_dpo.objective.layout import choose_layout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.choosing import fill_cache, make_cache, switches_adapters_off
from minimind_dpo.reference.sources import reference_digest
from minimind_dpo.training.session import in_session, tokenizer_path
from minimind_dpo.training.setup import check_vocabulary, load, load_data
from minimind_dpo.training.signals import StopRequest

logger = logging.getLogger("minimind_dpo.precompute")  # not __name__: the module also runs as __main__


def run(config: TrainConfig, last_act: bool = False) -> int:
    """Score every pair that a run of `config` will use with its reference; 0 when done, 75 when a signal stopped it.

    Nothing is trained and nothing is written but the cache; the same command goes on where it was stopped.

    Args:
        config: of the run to come. Its `reference` must be `auto` or `cache`.
        last_act: the process ends after it; signals that come then are ignored.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """
    if config.reference not in ("auto", "cache"):
        raise UserError(
            f"reference: a run with {config.reference} reads no cache, so there is nothing to compute "
            "beforehand; set it to cache, here and in train"
        )
    return in_session(config, lambda accelerator, stop: _precompute(config, accelerator, stop), last_act)


def _precompute(config: TrainConfig, accelerator: Accelerator, stop: StopRequest) -> None:
    tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
    with loading_reference(accelerator, offload=False):
        model = load(config, config.ref_model_name_or_path or config.model_name_or_path)
    check_vocabulary(model, tokenizer)
    needed = load_data(config, accelerator, tokenizer).needed()
    stop.listen()
    digest = reference_digest(model, scoring_dtype(accelerator))
    scorer = freeze(accelerator, PairScorer(model), offload=False)
    layout = choose_layout(unwrap(scorer), config.attn_implementation, accelerator.device, accelerator.autocast, decide)
    cache = make_cache(config, accelerator, digest, layout)
    begin = time.perf_counter()
    scored = fill_cache(accelerator, cache, scorer, layout, needed, stop.__bool__)
    seconds = time.perf_counter() - begin
    release(scorer)
    if accelerator.is_main_process:
        pairs = sum(len(part.positions) for part in needed)
        print(
            f"{pairs} pairs: {scored} scored ({scored / seconds:.1f} pairs/s), {pairs - scored} found\n"
            f"in {cache.directory}"
        )
    if switches_adapters_off(config):
        logger.info("with LoRA, train reads it if told --reference cache; by default it switches the matrices off")


def main(argv: list[str]) -> int:
    """`minimind-dpo precompute`."""
    return run(load_config(argv, "precompute"), last_act=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
