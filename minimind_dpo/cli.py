"""The console script `minimind-dpo`: verbs, each a function that lives elsewhere and is imported when called."""

from __future__ import annotations

import importlib
import sys

from minimind_dpo import __version__
from minimind_dpo.ending import Ending
from minimind_dpo.errors import EXIT_DONE, EXIT_USAGE

# verb -> (module, function of the remaining arguments, one line of help)
VERBS = {
    "train": ("minimind_dpo.train", "main", "train a model on preference pairs"),
    "precompute": ("minimind_dpo.precompute", "main", "fill the reference cache that train reads"),
    "evaluate": ("minimind_dpo.evaluate", "main", "figures of a model on held-out pairs, beside its start"),
    "demo": ("minimind_dpo.demo.run", "run_demo", "train the embedded demo and show replies before and after"),
    "data inspect": ("minimind_dpo.data.inspect", "run_inspect", "show a pair as the model sees it"),
    "data check": ("minimind_dpo.data.check", "run_check", "find what is wrong with data before a run is spent on it"),
    "report": ("minimind_dpo.report.command", "run_report", "write the page of a run, or compare several runs"),
    "export": ("minimind_dpo.export", "run_export", "write a model for transformers or for MiniMind"),
    "plan": ("minimind_dpo.planning.command", "run_plan", "predict the memory a run needs, and what fits"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb; exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped early with a checkpoint."""
    arguments = sys.argv[1:] if argv is None else argv
    for words in (2, 1):
        verb = " ".join(arguments[:words])
        if verb in VERBS:
            module, function, _ = VERBS[verb]
            with Ending() as ending:
                from minimind_dpo.launch.verbs import launched  # late: a signal meanwhile ends the command as any other

                code = launched(verb, arguments[words:])
                if code is None:
                    code = getattr(importlib.import_module(module), function)(arguments[words:])
                ending.code = code
            return ending.code
    if arguments[:1] in (["-h"], ["--help"]):
        print(_help())
        return EXIT_DONE
    if arguments[:1] == ["--version"]:
        print(f"minimind-dpo {__version__}")
        return EXIT_DONE
    print((f"minimind-dpo: no verb {' '.join(arguments[:2])!r}\n" if arguments else "") + _help(), file=sys.stderr)
    return EXIT_USAGE


def _help() -> str:
    lines = [f"  {verb:<14}{help}" for verb, (_, _, help) in VERBS.items()]
    return "usage: minimind-dpo VERB [--help] ...\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
