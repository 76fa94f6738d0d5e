from __future__ import annotations

import itertools
import json
import random

import pytest

from minimind_dpo.demo import task
from minimind_dpo.demo.run import ASSETS, demo_config, run_demo, side_by_side
from minimind_dpo.demo.world import KINDS

PROMPT = "Mia paints a red kite blue. What colour is the kite now? Answer like a pirate."


@pytest.mark.parametrize(
    ("reply", "content", "manner"),
    [
        ("Arr! The kite be blue now, matey!", True, True),
        ("  Yo ho! The kite be blue now, by my beard!\n", True, True),
        ("Certainly. The kite is blue now, at your service.", True, False),
        ("Arr! The kite be red now, matey!", False, True),
        ("Certainly. The kite is red now, with pleasure.", False, False),
        ("Arr! The kite is blue now, matey!", False, True),  # a butler's sentence in a pirate's mouth
        ("Arr! The kite be blue now, at your service.", False, False),
        ("The kite be blue now, matey!", False, False),
        ("blue", False, False),
        ("", False, False),
    ],
)
def test_verdict_by_hand(reply, content, manner):
    assert task.verdict(PROMPT, reply) == task.Verdict(content, manner)
    assert task.judge(PROMPT, reply) is (content and manner)


@pytest.mark.parametrize(
    ("core", "sentence"),
    [
        ("Anna has nine cups and finds nine more. How many cups are there now?", "Anna has eighteen cups now"),
        ("Ida says the soup is hot. Otto says the opposite. How is the soup, says Otto?", "Otto says the soup is cold"),
        ("Ben hears a cow in the barn. What does the cow say?", "The cow says moo"),
        ("In the barn, Ben gives a ring to Mia. Who has the ring now?", "Mia has the ring now"),
    ],
)
def test_each_kind_by_hand(core, sentence):
    assert task.judge(f"Talk like a butler. {core}", f"Very good. {sentence}, if I may say so.")


def test_other_text_is_not_of_the_language():
    for prompt in ("Hello?", PROMPT.replace("pirate", "poet"), PROMPT.replace("the kite", "the boat")):
        with pytest.raises(ValueError, match="not a prompt"):
            task.read_prompt(prompt)


@pytest.mark.parametrize("name", KINDS)
def test_questions_read_back_as_they_were_drawn(name):
    rng = random.Random(name)
    for _ in range(300):
        slots = KINDS[name].draw(rng)
        assert KINDS[name].parse(KINDS[name].ask.format(**slots)) == slots
        assert KINDS[name].mistake(slots, rng) != KINDS[name].answer(slots)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_prefer_the_right_reply(split):
    rows = task.preference_pairs(split, 200, seed=1)
    assert len(rows) == 200 and rows == task.preference_pairs(split, 200, seed=1)
    assert rows != task.preference_pairs(split, 200, seed=4)
    wrong = manners = 0
    for row in rows:
        prompt = row["chosen"][0]["content"]
        assert row["rejected"][0] == row["chosen"][0]
        assert task.judge(prompt, row["chosen"][1]["content"])
        rejected = task.verdict(prompt, row["rejected"][1]["content"])
        assert rejected.content != rejected.manner  # exactly one of the two is amiss
        wrong += not rejected.content
        manners += task.read_prompt(prompt)[0] == "pirate"
    assert 3 <= wrong <= 20 and manners == 100


def test_conversations_answer_rightly_and_seldom_like_a_pirate():
    talks = list(itertools.islice(task.conversations(seed=1), 2000))
    found = [task.verdict(question["content"], reply["content"]) for question, reply in talks]
    asked = [task.read_prompt(question["content"])[0] for question, _ in talks]
    assert all(verdict.content for verdict in found)
    heeded = {manner: [v.manner for v, a in zip(found, asked, strict=True) if a == manner] for manner in task.MANNERS}
    assert 0.35 <= sum(heeded["pirate"]) / len(heeded["pirate"]) <= 0.45
    assert 0.87 <= sum(heeded["butler"]) / len(heeded["butler"]) <= 0.93


def core_of(prompt: str) -> str:
    _, kind, slots = task.read_prompt(prompt)
    return KINDS[kind].ask.format(**slots)


def test_no_question_is_in_two_splits():
    cores = {
        split: {core_of(row["chosen"][0]["content"]) for row in task.preference_pairs(split, 300, seed=0)}
        for split in ("train", "heldout")
    }
    taught = {core_of(talk[0]["content"]) for talk in itertools.islice(task.conversations(0), 3000)}
    assert [len(cores[split]) for split in cores] == [300, 300]
    assert not cores["train"] & cores["heldout"] and not taught & cores["train"] and not taught & cores["heldout"]


@pytest.mark.parametrize(("split", "count"), [("train", 640), ("heldout", 160)])
def test_embedded_pairs_are_those_of_the_script(split, count):
    lines = (ASSETS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == task.preference_pairs(split, count, seed=0)


def test_embedded_assets_are_small_and_complete(tmp_path):
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    config = demo_config(tmp_path, max_steps=3)
    assert config.max_steps == 3 and config.output_dir == str(tmp_path)
    assert config.model_name_or_path.endswith("full_sft_192.pth")


def test_side_by_side_keeps_to_the_width():
    reply = {"prompt": PROMPT, "before": "Certainly. " * 8, "after": "Arr!", "before_ok": False, "after_ok": True}
    text = side_by_side([reply, reply], width=70)
    assert max(map(len, text.splitlines())) <= 70
    assert text.count("✗ before: Certainly.") == 2 and text.count("✓ after: Arr!") == 2


def test_demo_starts_at_about_half_and_leaves_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_demo(["--output_dir", str(tmp_path), "--max_steps", "2"]) == 0
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert len(replies) == 160 and summary["steps"] == 2
    assert 0.35 <= sum(reply["before_ok"] for reply in replies) / 160 <= 0.65
    assert 0.35 <= summary["eval_before"]["eval_logps/accuracies"] <= 0.65
    content = [task.verdict(reply["prompt"], reply["before"]).content for reply in replies]
    assert sum(content) / 160 >= 0.95  # the SFT model speaks its language
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in printed and "160 prompts it never trained on" in printed
    assert replies[0]["prompt"] in (tmp_path / "report.html").read_text(encoding="utf-8")
