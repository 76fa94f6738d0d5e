from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minimind_dpo.errors import UserError
from minimind_dpo.report import page
from minimind_dpo.report.curves import curves, series
from minimind_dpo.report.page import before_note, headlines, starts_at_ln2, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(autouse=True)
def with_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "curves", curves)


class Page(HTMLParser):
    """Checks that tags nest, and keeps visible text, tag names and outside references."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.outside: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def train_row(step: int, **more: float) -> dict:
    row = {"step": step, "epoch": step / 10, "pairs_seen": 16 * step, "loss": 0.7 / step, "grad_norm": 2.0,
           "learning_rate": 1e-4 / step, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.2 * step,
           "rewards/margins": 0.3 * step, "rewards/accuracies": 0.75, "pairs_per_second": 31.37,
           "peak_memory_gib": 0.8125}  # fmt: skip
    return row | more


def make_run(path: Path, steps: int = 12) -> Path:
    rows = [train_row(step) for step in range(1, steps + 1)]
    rows.insert(0, {"step": 0, "eval_loss": 0.6931, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0})
    rows.append({"step": steps, "eval_loss": 0.12, "eval_rewards/accuracies": 0.97, "eval_rewards/margins": 4.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = {"steps": steps, "pairs_seen": 192, "seconds": 61.25, "pairs_per_second": 31.37,
               "peak_memory_gib": 0.8125, "reference_digest": "ab12",
               "eval_before": {"eval_loss": 0.6931, "eval_logps/accuracies": 0.52},
               "eval_after": {"eval_loss": 0.12, "eval_logps/accuracies": 0.981}}  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (path / "config.yaml").write_text("beta: 0.1\nrun_name: <b>bold</b>\nshuffle: true\ntrain_data: [a.jsonl]\n")
    reply = {"prompt": "1 < 2 & <script>alert(1)</script>?", "before": "no", "after": "yes",
             "before_ok": False, "after_ok": True}  # fmt: skip
    (path / "replies.jsonl").write_text((json.dumps(reply) + "\n") * 15, encoding="utf-8")
    return path


def test_page_shows_every_figure_and_is_self_contained(tmp_path):
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for figure in ("52 % → 98 %", "0.693 → 0.12", "0 → 15", "12", "192", "61.2", "31.4", "0.812"):
        assert figure in page.text
    assert page.tags.count("svg") == 6
    assert page.tags.count("figure") == 6
    assert "script" not in page.tags and page.outside == []
    assert "@import" not in html and "url(http" not in html
    assert "ln 2: knows no preference" in html
    assert page.text.count("✗ wrong") == 0 and page.text.count("before: ✗ wrong") == 15
    assert page.text.count("after: ✓ right") == 15
    assert "true" in page.text and '["a.jsonl"]' in page.text  # the configuration, as yaml writes it
    assert not any(part.startswith("Not finished") for part in page.text)


def test_text_of_the_run_is_escaped(tmp_path):
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    assert "<script>" not in html and "1 &lt; 2 &amp; &lt;script&gt;" in html
    assert "<b>bold</b>" not in html and "<title>&lt;b&gt;bold&lt;/b&gt;" in html


def test_same_files_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_ids_that_curves_refer_to_are_not_shared_between_charts(tmp_path):
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    charts = html.split("<svg")[1:]
    clips = [{part.split('"')[0] for part in chart.split('<clipPath id="')[1:]} for chart in charts]
    assert all(clips) and len(set.union(*clips)) == sum(map(len, clips))


def test_unfinished_run_with_one_logged_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_row(7)) + "\n" + '{"step": 8, "lo', encoding="utf-8")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Not finished:" in page.text and page.tags.count("svg") == 6 and "7" in page.text
    assert "Held-out evaluation" not in page.text and "Configuration" not in page.text


def test_nothing_logged_yet(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No step has been logged yet." in page.text and "svg" not in page.tags


def test_users_mistakes(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl here"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{broken\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match="metrics.jsonl:2: not a JSON object"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", [b"[1]\n[2]\n", b"{broken\n{}\n", b"\xff\xfe\n{}\n", b"[" * 100_000 + b"\n{}\n"])
def test_damaged_replies_are_left_out_and_told(tmp_path, caplog, content):
    (make_run(tmp_path) / "replies.jsonl").write_bytes(content)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "script>" not in "".join(page.text)
    assert "replies.jsonl:1: not a JSON object" in caplog.text and "the report shows no replies" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"[1]\n{}\n", b"\xff\xfe\n{}\n", b"[" * 100_000 + b"\n{}\n", b"{'a\n{}\n"])
def test_what_the_run_wrote_and_is_damaged_is_one_error(tmp_path, name, content):
    (make_run(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*: not a (JSON|YAML) object"):
        write_report(tmp_path)


def test_series_keeps_finite_points_of_the_lines_that_have_the_key():
    rows = [{"step": 1, "loss": 0.5}, {"step": 1, "eval_loss": 0.4}, {"step": 2, "loss": math.nan},
            {"step": 3, "loss": 0.25}, {"step": 4, "loss": None}]  # fmt: skip
    assert series(rows, "loss") == ([1.0, 3.0], [0.5, 0.25])
    assert series(rows, "eval_loss") == ([1.0], [0.4])
    assert series(rows, "grad_norm") == ([], [])


def test_what_is_said_of_losses_is_true_of_them():
    """ln 2 and a start of 0 belong to log-sigmoid losses beside a reference that is the policy's start."""
    assert starts_at_ln2({}) and starts_at_ln2({"loss_type": "sigmoid_norm"}) and starts_at_ln2({"loss_type": ["aot"]})
    assert not starts_at_ln2({"loss_type": ["ipo"]}) and not starts_at_ln2({"loss_type": ["sigmoid", "sft"]})
    assert before_note({"loss_type": ["ipo"]}).startswith("Before: the policy still equals the reference")
    assert before_note({"loss_type": ["simpo", "sft"]}).startswith("Without a reference")
    assert "need not begin at 0" in before_note({"ref_model_name_or_path": "other"})
    rows = [{"step": 1, "loss": 3.0, "losses/simpo": 1.0, "losses/sft": 2.0}]
    titles = dict(curves(rows, starts_at_ln2=False, refers=False))
    assert "ln 2" not in titles["Loss (nats a pair)"] and "ln 2" in dict(curves(rows))["Loss (nats a pair)"]
    assert "simpo" in titles["Parts of the loss (unweighted)"]
    assert "Parts of the loss (unweighted)" not in dict(curves([{"step": 1, "loss": 3.0}]))


def test_reward_accuracy_has_no_before():
    summary = {"eval_before": {"eval_rewards/accuracies": 0.0}, "eval_after": {"eval_rewards/accuracies": 0.97}}
    assert headlines(summary, [], []) == [("97 %", "held-out pairs that reward the chosen reply more, after")]
