"""`minimind-dpo precompute`: fills the reference cache on its own, so that training starts at once.

`python -m minimind_dpo.precompute` equals `minimind-dpo precompute`; both take the flags of `train`.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.ending import Ending
from minimind_dpo.errors import UserError
from minimind_dpo.launch.verbs import launched

if TYPE_CHECKING:
    from minimind_dpo.training.session import Session

logger = logging.getLogger("minimind_dpo.precompute")  # not __name__: the module also runs as __main__


def run(config: TrainConfig, ends_process: bool = False) -> int:
    """Score every pair that a run of `config` will use with its reference; 0 when done, 75 when a signal stopped it.

    Nothing is trained and nothing is written but the cache; the same command goes on where it was stopped.

    Args:
        config: of the run to come. Its `reference` must be `auto` or `cache`.
        ends_process: the process ends after it; signals that come then are ignored.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """
    if config.reference not in ("auto", "cache"):
        raise UserError(
            f"reference: a run with {config.reference} reads no cache, so there is nothing to compute "
            "beforehand; set it to cache, here and in train"
        )
    if config.sync_ref_model:
        raise UserError(
            "sync_ref_model: a reference that follows the policy reads no cache, so there is nothing to compute"
        )
    if not config.needs_reference:
        raise UserError(f"loss_type: {', '.join(config.loss_type)} reads no reference, so there is nothing to compute")
    from minimind_dpo.engine.devices import repeating  # late: see `_precompute`
    from minimind_dpo.training.session import Session  # late for the same reason

    with repeating(config.deterministic), Session(config, ends_process) as session:
        _precompute(config, session)
    return session.exit_code


def _precompute(config: TrainConfig, session: Session) -> None:
    # late: torch and transformers take seconds, which --help and a mistake in the settings need not wait for
    from minimind_dpo.data.chat import load_tokenizer
    from minimind_dpo.engine.protocol import unwrap
    from minimind_dpo.engine.ranks import decide
    from minimind_dpo.objective.layout import choose_layout
    from minimind_dpo.objective.scoring import PairScorer
    from minimind_dpo.reference.choosing import make_cache, weight_rounding
    from minimind_dpo.reference.digest import reference_digest
    from minimind_dpo.reference.filling import fill_cache
    from minimind_dpo.training.data import load_data, tokenizer_path
    from minimind_dpo.training.fitting import check_fits, check_reference_tokenizer
    from minimind_dpo.training.settle import settle
    from minimind_dpo.training.weights import load_reference_start

    engine = session.engine
    config = settle(config, engine)
    tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
    with engine.loading_reference(offload=False):
        model = load_reference_start(config, engine)
    data = load_data(config, engine, tokenizer, session.stop.signalled)
    check_fits((model,), tokenizer, data.parts(), config.max_length)
    if config.ref_model_name_or_path is not None:
        check_reference_tokenizer(config.ref_model_name_or_path, tokenizer, data.parts())
    needed = data.needed()
    digest = reference_digest(model, engine.weights_dtype)
    scorer = engine.freeze(PairScorer(model, config.matmul), False, weight_rounding(config))
    layout = choose_layout(unwrap(scorer), config.attn_implementation, engine.device, engine.autocast, decide)
    cache = make_cache(config, engine, digest, layout)
    begin = time.perf_counter()
    scored = fill_cache(engine, cache, scorer, layout, needed, session.stop.signalled)
    seconds = time.perf_counter() - begin
    engine.release(scorer)
    if engine.is_main:
        pairs = sum(len(wanted.positions) for wanted in needed)
        print(
            f"{pairs} pairs: {scored} scored ({scored / seconds:.1f} pairs/s), {pairs - scored} found\n"
            f"in {cache.directory}"
        )
    if config.switches_adapters_off:
        logger.info("with LoRA, train reads it if told --reference cache; by default it switches the matrices off")


def main(argv: list[str]) -> int:
    """`minimind-dpo precompute`."""
    return run(load_config(argv, "precompute"), ends_process=True)


if __name__ == "__main__":
    with Ending() as ending:
        code = launched("precompute", sys.argv[1:])
        ending.code = main(sys.argv[1:]) if code is None else code
    sys.exit(ending.code)
