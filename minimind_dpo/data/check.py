"""`minimind-dpo data check`: everything that is wrong with preference data, before a run is spent on it."""

from __future__ import annotations

import argparse
import json

from minimind_dpo.config import read_columns
from minimind_dpo.data.arguments import data_parser
from minimind_dpo.data.chat import check_settings, load_tokenizer
from minimind_dpo.errors import EXIT_DONE, EXIT_FAILED


def run_check(argv: list[str]) -> int:
    """Check the data that `argv` names. Returns the exit code: 1 where there is a finding that is an error, else 0.

    Raises:
        UserError: no such data, no tokenizer, wrong settings, or a ledger that can't be written.
    """
    args = _parser().parse_args(argv)
    # late: numpy and tqdm, which --help need not wait for
    from minimind_dpo.data.checking.findings import open_ledger
    from minimind_dpo.data.checking.report import as_json, as_text
    from minimind_dpo.data.checking.survey import note_leaks, survey
    from minimind_dpo.data.processes import Settings, column_names

    tokenizer = load_tokenizer(args.tokenizer)
    check_settings(tokenizer, args.max_length, args.completion_mask)
    columns = column_names(read_columns(args.columns))
    settings = Settings(args.max_length, args.completion_mask, "drop", args.template_date, columns)
    with open_ledger(args.ledger) as ledger:
        found = survey(args.data, tokenizer, settings, args.num_proc, ledger)
        evaluation = survey(args.eval_data, tokenizer, settings, args.num_proc, ledger) if args.eval_data else None
        if evaluation is not None:
            note_leaks(found, evaluation, ledger)
    report = as_json(found, evaluation)
    print(json.dumps(report, ensure_ascii=False) if args.json else as_text(report, found, evaluation))
    wrong = found.findings.has_error() or (evaluation is not None and evaluation.findings.has_error())
    return EXIT_FAILED if wrong else EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = data_parser(
        "data check",
        "Find what is wrong with preference data: rows that training would refuse, leave out or "
        "misunderstand, copies, contradictions and leaks; and how long pairs are. Exit code 1 where there is an error.",
    )
    parser.add_argument("--eval_data", nargs="+", help="checked as well; no training row may be in it")
    parser.add_argument("--ledger", metavar="OUT.jsonl", help="write every finding there, a line each")
    parser.add_argument("--num_proc", type=int, help="processes (default: all cores where the data is large)")
    return parser
