"""`minimind-dpo report`: the page of a run once more, or one page that compares several."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_report(argv: list[str]) -> int:
    """Run `minimind-dpo report`.

    Args:
        argv: the command line after `report`.

    Returns:
        The exit code 0; a wrong usage exits with 2 through argparse.

    Raises:
        UserError: a directory is no run's, or what its run wrote there is damaged; the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="minimind-dpo report",
        description="Write the page of a run anew, RUN/report.html, or one page that compares several runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run, finished or not")
    parser.add_argument(
        "--output", metavar="FILE", help="the page (default: RUN/report.html, or comparison.html here for several)"
    )
    options = parser.parse_args(argv)
    from minimind_dpo.files import writing  # late: --help answers at once
    from minimind_dpo.report.comparison import write_comparison  # late for the same reason
    from minimind_dpo.report.page import write_report  # late for the same reason

    runs = [Path(run) for run in options.runs]
    path = Path(options.output or (runs[0] / "report.html" if len(runs) == 1 else "comparison.html"))
    with writing(path, "--output"):
        print(f"wrote {write_report(runs[0], path) if len(runs) == 1 else write_comparison(runs, path)}")
    return 0
