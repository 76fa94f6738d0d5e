"""A recipe run on a model's own answers: pairs, training in full and with LoRA, held-out figures and replies.

    python -m benchmarks.recipes --model DIR [--output_dir runs/recipes] [--questions 240] [--only NAME ...]

To each question the model gives several sampled answers; the shortest that ended by itself is preferred to the
longest, if that is half as long again at least. So the pairs ask for brevity, on-policy, as preference data of one's
own often begin. Every fourth question is held out. Every run is the ordinary command with
`configs/dpo/smollm2_135m.yaml`; printed are its time and memory, the held-out figures that it writes, and of greedy
replies to the held-out questions:

    words      mean length, words
    ended      share that ended within 96 tokens
    right      share with the right word, of questions that have one: what must not be forgotten
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.models.loading import load_model

RECIPE = Path(__file__).parent.parent / "configs" / "dpo" / "smollm2_135m.yaml"
SETTINGS: dict[str, dict[str, object]] = {
    "full, 1e-6": {},
    "full, 5e-6": {"learning_rate": 5e-6},
    "LoRA, rank 16, 2e-4": {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4},
}
MOST_TOKENS = 96
ANSWERS = 4
LONGER = 1.5
CAPITALS = """
France Paris, Spain Madrid, Italy Rome, Germany Berlin, Japan Tokyo, China Beijing, Egypt Cairo, Russia Moscow,
Greece Athens, Portugal Lisbon, Austria Vienna, Poland Warsaw, Norway Oslo, Sweden Stockholm, Denmark Copenhagen,
Finland Helsinki, Ireland Dublin, Hungary Budapest, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Iran
Tehran, Iraq Baghdad, Turkey Ankara, India Delhi, Thailand Bangkok, Vietnam Hanoi, Canada Ottawa, Argentina Buenos,
Belgium Brussels, Netherlands Amsterdam, Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Colombia Bogot, Ecuador
Quito, Lebanon Beirut, Nepal Kathmandu, Indonesia Jakarta
"""
THINGS = """
volcano, glacier, comet, bridge, violin, compass, telescope, battery, magnet, sailboat, lighthouse, windmill,
microscope, thermometer, rainbow, desert, island, forest, river, waterfall, tornado, earthquake, democracy, budget,
recipe, poem, novel, library, museum, hospital, vaccine, virus, planet, star, galaxy, atom, molecule, engine,
bicycle, airplane, submarine, elevator, calendar, dictionary, map, mirror, candle, umbrella, passport, symphony
"""
TASKS = """
boil an egg, tie a shoelace, plant a tree, brew tea, clean a window, fold a shirt, ride a bicycle, write a letter,
learn a language, save money, sleep better, make a salad, wash a sweater, pack a suitcase, remember names, stay
healthy, bake bread, grow tomatoes, paint a wall, fix a flat tire, read faster, train a dog, start a diary, make new
friends, cook rice, sharpen a knife, take good photographs, swim, meditate, study for an exam
"""


def questions(count: int) -> list[tuple[str, str | None]]:
    """So many questions, mixed, each with the word that a right answer has, if there is one."""
    kinds: list[list[tuple[str, str | None]]] = [
        [(f"What is the capital of {country}?", city) for country, city in (pair.split() for pair in _items(CAPITALS))],
        [(f"What is a {thing}?", None) for thing in _items(THINGS)],
        [(f"How do I {task}?", None) for task in _items(TASKS)],
        [(f"What is {a} plus {b}?", str(a + b)) for a in range(2, 12) for b in range(2, 12, 2)],
        [(f"Tell me something about {thing}s.", None) for thing in _items(THINGS)],
    ]
    mixed = [kind[place] for place in range(max(map(len, kinds))) for kind in kinds if place < len(kind)]
    return mixed[:count]


def _items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",")]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: list[str], times: int) -> list[list[tuple[str, bool]]]:
    """Of each question so many answers, sampled, or one greedy one; each with whether it ended by itself."""
    torch.manual_seed(0)
    given = []
    for question in asked:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        told = (
            {"do_sample": True, "num_return_sequences": times, "temperature": 1.0}
            if times > 1
            else {"do_sample": False}
        )
        rows = model.generate(
            **ids,
            max_new_tokens=MOST_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **told,
        )[:, ids["input_ids"].shape[1] :]
        given.append(
            [
                (tokenizer.decode(row, skip_special_tokens=True).strip(), tokenizer.eos_token_id in row.tolist())
                for row in rows
            ]
        )
    return given


def make_pairs(model: Any, tokenizer: Any, count: int, directory: Path) -> None:
    """Write train.jsonl and heldout.jsonl: of each question a short answer that ended, and a long one."""
    asked = [question for question, _ in questions(count)]
    files: dict[str, list[str]] = {"train.jsonl": [], "heldout.jsonl": []}
    for number, (question, given) in enumerate(zip(asked, answers(model, tokenizer, asked, ANSWERS), strict=True)):
        ended = sorted((text for text, whole in given if whole and text), key=len)
        longest = max((text for text, _ in given), key=len)
        if ended and len(longest) >= LONGER * len(ended[0]):
            row = {"prompt": question, "chosen": ended[0], "rejected": longest}
            files["train.jsonl" if number % 4 else "heldout.jsonl"].append(json.dumps(row))
    for name, rows in files.items():
        (directory / name).write_text("".join(f"{row}\n" for row in rows), "utf-8")


def train(model: str, directory: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """One run of the command, unless it is finished already; its directory and its summary."""
    output = directory / name.replace(",", "").replace(" ", "_")
    flags = {
        "config": RECIPE,
        "model_name_or_path": model,
        "train_data": directory / "train.jsonl",
        "eval_data": directory / "heldout.jsonl",
        "eval_steps": 5,
        "logging_steps": 1,
        "output_dir": output,
    } | SETTINGS[name]
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    if not (output / "summary.json").exists():
        environment = os.environ | {"MINIMIND_DPO_CACHE": str(directory / "cache")}
        subprocess.run([sys.executable, "-m", "minimind_dpo.train", *words], check=True, env=environment)
    return output, json.loads((output / "summary.json").read_text("utf-8"))


def replies(model: str, tokenizer: Any, count: int, file: Path) -> str:
    """Cells of greedy replies to the held-out questions, which are also written down."""
    asked = [(question, word) for number, (question, word) in enumerate(questions(count)) if number % 4 == 0]
    given = [found[0] for found in answers(load_model(model).eval(), tokenizer, [question for question, _ in asked], 1)]
    rows = [{"question": question, "reply": text} for (question, _), (text, _) in zip(asked, given, strict=True)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    right = [word in text for (_, word), (text, _) in zip(asked, given, strict=True) if word]
    words = sum(len(text.split()) for text, _ in given) / len(given)
    return f"{words:.1f} | {sum(whole for _, whole in given) / len(given):.0%} | {sum(right) / len(right):.0%}"


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct or another chat model: a directory")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.model)
    if not (options.output_dir / "heldout.jsonl").exists():
        make_pairs(load_model(options.model).eval(), tokenizer, options.questions, options.output_dir)
    counts = [
        len((options.output_dir / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in ("train", "heldout")
    ]
    print(f"{counts[0]} pairs to train on, {counts[1]} held out\n")
    print("| run | s | GiB | loss | accuracy | margin | chosen | words | ended | right |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    before = replies(options.model, tokenizer, options.questions, options.output_dir / "before.jsonl")
    print(f"| before | | | 0.6931 | | 0 | 0 | {before} |", flush=True)
    for name in options.only:
        output, summary = train(options.model, options.output_dir, name)
        start, end = summary["eval_before"], summary["eval_after"]
        cells = [
            f"{summary['seconds']:.0f}",
            f"{summary['peak_memory_gib']:.1f}",
            f"{end['eval_loss']:.4f}",
            f"{end['eval_rewards/accuracies']:.1%}",
            f"{end['eval_rewards/margins']:.2f}",
            f"{end['eval_logps/chosen'] - start['eval_logps/chosen']:+.1f}",
            replies(str(output / "model"), tokenizer, options.questions, output / "replies.jsonl"),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
