"""The flags that every verb about data has: which data, and how training would read it."""

from __future__ import annotations

import argparse

from minimind_dpo.config import COMPLETION_MASKS, TrainConfig
from minimind_dpo.config.data import check_day


def data_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of `minimind-dpo VERB` with these flags; the defaults are those of training."""
    parser = argparse.ArgumentParser(prog=f"minimind-dpo {verb}", description=description)
    parser.add_argument("--data", required=True, nargs="+", help="preference data: file, glob, directory or hub id")
    parser.add_argument("--columns", nargs="+", default=[], help="whose columns are meant: prompt=question,chosen=good")
    parser.add_argument("--tokenizer", required=True, help="directory, .gguf file or hub id of the tokenizer")
    parser.add_argument(
        "--max_length", type=int, default=TrainConfig.max_length, help="tokens a side (default %(default)s)"
    )
    parser.add_argument(
        "--completion_mask",
        choices=COMPLETION_MASKS,
        default=TrainConfig.completion_mask,
        help="which tokens count: every assistant turn, or only the answer in which the sides differ "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--template_date",
        type=_day,
        metavar="YYYY-MM-DD",
        default=TrainConfig.template_date,
        help="what a chat template takes for today (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _day(text: str) -> str:
    try:
        return check_day(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
