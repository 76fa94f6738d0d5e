"""`minimind-dpo evaluate`: what a model does on held-out pairs, beside its start or another model.

`python -m minimind_dpo.evaluate` equals `minimind-dpo evaluate`; started by a launcher it goes on as many processes as
that starts, and gives the same digits.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from minimind_dpo.config import TrainConfig, make_config
from minimind_dpo.config.flags import add_loss_settings, add_settings
from minimind_dpo.config.launcher_flags import add_launcher_help
from minimind_dpo.ending import Ending
from minimind_dpo.errors import UserError
from minimind_dpo.launch.verbs import launched

if TYPE_CHECKING:
    from minimind_dpo.evaluation.subject import Subject

# What an evaluation can be told; where a run is evaluated, its own settings are the defaults.
SETTINGS = (
    *("tokenizer_name_or_path", "num_attention_heads", "trust_remote_code", "attn_implementation"),
    *("matmul", "weight_rounding", "deterministic"),
    *("max_length", "completion_mask", "on_bad_row", "template_date", "columns"),
    *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"),
    *("ld_alpha", "use_weighting", "ddp_timeout", "seed"),
)
_REPLIES = ("generate_prompts", "max_new_tokens", "temperature")
_OWN = ("model", "data", "baseline", "by", "pairs", "json")


def main(argv: list[str]) -> int:
    """`minimind-dpo evaluate`; 0 when done, 75 when a signal stopped it: the same command goes on there.

    Raises:
        UserError: a mistake in the settings, the data or the files named.
    """
    args = vars(_parser().parse_args(argv))
    # late: torch and transformers take seconds, which --help and a wrong flag need not wait for
    from minimind_dpo.engine.devices import repeating
    from minimind_dpo.evaluation.command import Asked, run_evaluation
    from minimind_dpo.evaluation.subject import find_subject
    from minimind_dpo.training.session import Session

    subject = find_subject(args["model"])
    flags = {name: _alone(value) for name, value in args.items() if value is not None and name not in _OWN}
    config = _configuration(subject, args["data"], flags)
    asked = Asked(subject, args["baseline"], args["by"], args["pairs"], args["json"])
    out = sys.stdout
    # what libraries print is no part of the answer
    with redirect_stdout(sys.stderr), repeating(config.deterministic), Session(config, ends_process=True) as session:
        run_evaluation(config, asked, session, out)
    return session.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimind-dpo evaluate", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="run, checkpoint or model directory, hub id or MiniMind .pth")
    parser.add_argument(
        "--data", nargs="+", help="held-out pairs; name=DATA each for several sets (default: the run's)"
    )
    parser.add_argument("--baseline", help="another model to compare with (default: the run's own reference)")
    parser.add_argument("--by", metavar="COLUMN", help="figures for each value of a column; source: for each file")
    parser.add_argument("--pairs", metavar="OUT.jsonl", help="write the values of each pair there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("settings", "those of train; a run's own are the defaults where it is evaluated")
    add_settings(group, SETTINGS)
    add_settings(parser.add_argument_group("replies", "of the model and the baseline, side by side"), _REPLIES)
    add_loss_settings(parser)
    add_launcher_help(parser)
    return parser


def _configuration(subject: Subject, data: list[str] | None, flags: dict[str, object]) -> TrainConfig:
    """The settings of model, data and loss."""
    values = subject.defaults(SETTINGS) | flags | {"model_name_or_path": subject.path}
    if data is not None:
        values |= {"eval_data": data, "eval_split": None, "train_data": values.get("train_data") or data}
    if not values.get("eval_data") and values.get("eval_split") is None:
        raise UserError("--data: missing; name held-out pairs, a .jsonl (or .json, .parquet, hub id)")
    return make_config(values)


def _alone(value: object) -> object:
    """A flag's value out of the list that argparse makes of it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


if __name__ == "__main__":
    with Ending() as ending:
        code = launched("evaluate", sys.argv[1:])
        ending.code = main(sys.argv[1:]) if code is None else code
    sys.exit(ending.code)
