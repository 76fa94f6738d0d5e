"""Which settings learn without forgetting: one model, one set of pairs, one table row a setting.

    python benchmarks/learning.py [--assets DIR] [--pairs 640] [--output_dir runs/learning] [--only NAME ...]

DIR holds what `scripts/make_demo.py` writes: `full_sft_*.pth`, `tokenizer/` and `heldout.jsonl` (default: the embedded
demo; `make_demo.py --hidden_size 512 --layers 8` makes MiniMind2-small's shape). Every run is the ordinary command, one
epoch over freshly drawn pairs in steps of 4; the figures are of the 160 held-out pairs and of greedy replies to their
prompts:

    loss       eval_loss
    accuracy   eval_rewards/accuracies
    margin     eval_rewards/margins, beta times the difference of summed log-ratios
    likelier   pairs whose chosen reply the policy itself finds likelier a token (before training about half)
    chosen     change of the chosen replies' summed log-probability, nats: far below 0 is unlearning
    manner     replies in the manner asked for: what the pairs teach
    content    replies whose content is right: what must not be forgotten
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from minimind_dpo.data.tokenized import load_tokenizer
from minimind_dpo.demo.replies import generate_replies
from minimind_dpo.demo.run import ASSETS
from minimind_dpo.demo.task import preference_pairs, verdict
from minimind_dpo.models.loading import load_model

ORIGINAL = {"loss_type": "sigmoid_norm", "beta": 0.1, "learning_rate": 4e-8}
SUMMED = {"loss_type": "sigmoid", "beta": 0.1}
SETTINGS = {
    "original": ORIGINAL,
    "original lr x100": ORIGINAL | {"learning_rate": 4e-6},
    "original lr x1000": ORIGINAL | {"learning_rate": 4e-5},
    "norm beta 2, 1e-5": ORIGINAL | {"beta": 2.0, "learning_rate": 1e-5},
    "norm beta 2, 3e-5": ORIGINAL | {"beta": 2.0, "learning_rate": 3e-5},
    "sum, 1e-6": SUMMED | {"learning_rate": 1e-6},
    "sum, 5e-6": SUMMED | {"learning_rate": 5e-6},
    "sum, 1e-5": SUMMED | {"learning_rate": 1e-5},
    "sum, 3e-5": SUMMED | {"learning_rate": 3e-5},
    "sum, 1e-4": SUMMED | {"learning_rate": 1e-4},
    "sum, 1e-3": SUMMED | {"learning_rate": 1e-3},
    "sum, 1e-6, 4 epochs": SUMMED | {"learning_rate": 1e-6, "num_train_epochs": 4},
    "sum, 2e-6, 4 epochs": SUMMED | {"learning_rate": 2e-6, "num_train_epochs": 4},
    "sum, 5e-6, 4 epochs": SUMMED | {"learning_rate": 5e-6, "num_train_epochs": 4},
}


def train(assets: Path, train_data: Path, output_dir: Path, settings: dict[str, object]) -> dict[str, dict[str, float]]:
    """Run the command unless `output_dir` holds the finished run already; its summary."""
    if not (output_dir / "summary.json").exists():
        (weights,) = assets.glob("*.pth")
        flags = {
            "model_name_or_path": weights,
            "tokenizer_name_or_path": assets / "tokenizer",
            "train_data": train_data,
            "eval_data": assets / "heldout.jsonl",
            "max_length": 128,
            "save_steps": 0,
            "output_dir": output_dir,
        } | settings
        command = [sys.executable, "-m", "minimind_dpo.train"]
        subprocess.run(
            [*command, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))],
            check=True,
            env=os.environ | {"MINIMIND_DPO_CACHE": str(output_dir.parent / "cache")},
            stderr=subprocess.DEVNULL,
        )
    return json.loads((output_dir / "summary.json").read_text())


def replies_right(model_path: Path, assets: Path) -> tuple[float, float]:
    """Shares of greedy replies to the held-out prompts with the manner asked for and with the right content."""
    rows = [json.loads(line) for line in (assets / "heldout.jsonl").read_text().splitlines()]
    prompts = [row["chosen"][0]["content"] for row in rows]
    replies = generate_replies(load_model(str(model_path)), load_tokenizer(str(assets / "tokenizer")), prompts)
    found = [verdict(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    return sum(v.manner for v in found) / len(found), sum(v.content for v in found) / len(found)


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--pairs", type=int, default=640, help="at most 4000: the demo's world is small")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/learning"))
    parser.add_argument("--only", nargs="+", default=list(SETTINGS))
    options = parser.parse_args()
    if options.pairs > 4000:
        parser.error("--pairs: the demo's world has no more than some 4000 different questions for training")
    print("| setting | loss | accuracy | margin | likelier | chosen | manner | content |")
    print("|---|---|---|---|---|---|---|---|")
    (start,) = options.assets.glob("*.pth")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    train_data = options.output_dir / "train.jsonl"
    train_data.write_text("".join(json.dumps(row) + "\n" for row in preference_pairs("train", options.pairs, seed=0)))
    for index, name in enumerate(["before", *options.only]):
        if index == 0:
            manner, content = replies_right(start, options.assets)
            print(f"| before | 0.6931 | | 0 | | 0 | {manner:.1%} | {content:.1%} |", flush=True)
            continue
        output_dir = options.output_dir / name.replace(" ", "_").replace(",", "")
        summary = train(options.assets, train_data, output_dir, SETTINGS[name])
        before, after = summary["eval_before"], summary["eval_after"]
        manner, content = replies_right(output_dir / "model", options.assets)
        print(
            f"| {name} | {after['eval_loss']:.4f} | {after['eval_rewards/accuracies']:.1%} "
            f"| {after['eval_rewards/margins']:.3f} "
            f"| {before['eval_logps/accuracies']:.1%} → {after['eval_logps/accuracies']:.1%} "
            f"| {after['eval_logps/chosen'] - before['eval_logps/chosen']:+.1f} | {manner:.1%} | {content:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
