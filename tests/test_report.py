"""The page of a run: what is on it, that it loads nothing, that it can be read without seeing it, and stays small."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minimind_dpo.cli import main as cli
from minimind_dpo.errors import UserError
from minimind_dpo.report import html as page_html
from minimind_dpo.report.curves import curves
from minimind_dpo.report.facts import before_note, headlines, starts_at_ln2
from minimind_dpo.report.page import write_report
from minimind_dpo.report.reading import Metrics
from minimind_dpo.report.samples import coloured, histograms, live_replies
from minimind_dpo.report.thinning import MOST, thin

REPORT = Path(page_html.__file__).parent
VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"


class Page(HTMLParser):
    """Checks that tags nest; keeps visible text, tags with attributes, and the content of scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data
        else:
            self.text.append(data.strip())

    def of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every such element."""
        return [attributes for name, attributes in self.tags if name == tag]

    def plots(self) -> list[dict[str, str]]:
        """The places of charts."""
        return [attributes for attributes in self.of("div") if attributes.get("class") == "plot"]


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
    record(path / "record")
    return path


def record(path: Path) -> None:
    """What training keeps for the page."""
    path.mkdir()
    rows = [
        {"step": step, "pairs": 4, "chosen": {"power": -1, "first": 0, "counts": [4]},
         "rejected": {"power": -2, "first": -3, "counts": [1, 0, 3]}, "margins": [-0.5, 0.1, 0.5, 0.9, 1.5],
         "length_correlation": 0.25, "by_length": [{"from": -2, "to": 0, "pairs": 4, "margin": 0.5, "accuracy": 0.75}]}
        for step in (0, 12)
    ]  # fmt: skip
    side = {"reward": 0.5, "before": "question", "tokens": [["Hello", 0.0], [HOSTILE, 0.7], ["!", None]], "cut": 3}
    pair = {"kind": "worst", "place": "a/b.jsonl:3", "margin": -1.0, "longer": -2.0, "chosen": side, "rejected": side}
    quantiles = {"median": 3.0, "95 %": 7.0, "longest": 9.0}
    data = {"pairs": 192, "rows": 200, "dropped": {"empty_answer": 8}, "examples": {"empty_answer": "a.jsonl:7"},
            "tokens": dict.fromkeys(("chosen", "rejected", "input"), quantiles),
            "longer": {"chosen": 0.4, "rejected": 0.5}}  # fmt: skip
    for name, content in (("rewards.jsonl", rows), ("pairs.jsonl", [pair]),
                          ("warnings.jsonl", [{"step": 9, "text": f"chosen falls {HOSTILE}"}])):  # fmt: skip
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    (path / "data.json").write_text(json.dumps({"train": data}))
    (path / "environment.json").write_text(json.dumps({"torch": "2.13", "processes": 2}))


def shown(run: Path) -> Page:
    """The page of a run."""
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_page_shows_every_figure(tmp_path):
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for figure in ("52\u00a0% → 98\u00a0%", "0.693 → 0.12", "0 → 15", "12", "192", "61.2", "31.4", "0.812"):
        assert figure in page.text
    assert len(page.plots()) == 9  # the metrics' own seven, margins by quantile, margin and length
    assert page.text.count("after: ✓ right") == 15 and page.text.count("before: ✗ wrong") == 15
    assert {"true", '["a.jsonl"]', "2 settings at their defaults"} <= set(page.text)  # beta and shuffle
    assert {"8 empty_answer (first: a.jsonl:7)", "3 / 7 / 9", "40\u00a0%", "2.13", "−2 to 0"} <= set(page.text)
    assert any("(b.jsonl:3; chosen -2 tokens)" in part for part in page.text)
    assert not any(part.startswith("Not finished") for part in page.text)


def loads_nothing(html: str) -> None:
    """No element names anything outside the page, and its policy would let it load nothing."""
    page = Page(html)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "xlink:href", "action", "data", "poster", "style"} & set(attributes), (
            tag,
            attributes,
        )
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        assert attributes.get("href", "#").startswith("#")
    assert "@import" not in html and not re.search(r"url\(", "".join(page.raw["style"]))
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.pop("default-src") == allowed.pop("base-uri") == allowed.pop("form-action") == "'none'"
    scripts = [text for text, kind in zip(page.raw["script"], page.of("script"), strict=True) if not kind]
    assert allowed.pop("script-src").split() == [digest(text) for text in scripts]
    assert allowed.pop("style-src").split() == [digest(text) for text in page.raw["style"]] and not allowed


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_page_loads_nothing(tmp_path):
    loads_nothing(write_report(make_run(tmp_path)).read_text(encoding="utf-8"))


def test_text_of_the_run_is_escaped(tmp_path):
    """A name, a reply, a token, a warning and a label of a chart that would end what they stand in."""
    run = make_run(tmp_path)
    (run / "config.yaml").write_text(json.dumps({"run_name": HOSTILE, "loss_type": ["sigmoid", "sft"]}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, f"losses/{HOSTILE}": 1.0}) + "\n")
    with (run / "replies.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "prompt": HOSTILE, "reply": HOSTILE}) + "\n")
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.of("script")) == 3 and "alert(2)" not in "".join(page.raw["script"][1:])
    assert json.loads(page.raw["script"][0])[1]["lines"][0]["label"] == HOSTILE
    assert page.text.count(HOSTILE) >= 6 and "<script>alert" not in html
    loads_nothing(html)


def test_a_browser_draws_every_chart(tmp_path):
    """What the script leaves in the page: a canvas and a legend in each place, and no element that a text made."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    run = make_run(tmp_path)
    (run / "config.yaml").write_text(json.dumps({"run_name": HOSTILE}))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = write_report(run).as_uri()
    dom = subprocess.run([browser, *flags, address], capture_output=True, text=True, timeout=60).stdout
    assert dom.count("<canvas") == dom.count('<table class="u-legend') == 9
    assert ">0.05833<" in dom.partition('<table class="u-legend')[2]  # without a cursor the last value: 0.7 / 12
    assert dom.count("<img") == 0


def test_it_can_be_read_without_seeing_it(tmp_path):
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and '<html lang="en">' in html
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "for"):
            assert attributes.get(name, ids[0]) in ids
        assert attributes.get("href", f"#{ids[0]}")[1:] in ids
    assert all(plot["role"] == "img" for plot in page.plots())
    assert page.plots()[0]["aria-label"].startswith(
        "Line chart over optimizer steps. training: from 0.7 at step 1 to 0.05833 at step 12, lowest 0.05833, highest"
    )
    for svg in page.of("svg"):
        assert svg["role"] == "img" and svg["aria-label"]
    assert len(page.of("table")) >= len(page.plots()) + 4  # one with the numbers of each chart
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """Text has 4.5 to 1, lines of charts 3 to 1, on whatever they lie on."""
    css = (REPORT / "templates" / "page.css").read_text("utf-8")
    light, dark = css.partition("@media (prefers-color-scheme: dark)")[::2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark.partition("* {")[0]))
    grounds = ["paper", "card", "right-bg", "wrong-bg", "warn-bg"]
    shades = [f"{sign}{step}" for sign in "pn" for step in range(1, 5)]
    texts = [("ink", ground) for ground in grounds + shades]
    texts += [(name, ground) for name in ("soft", "accent") for ground in ("paper", "card")]
    texts += [("right", "right-bg"), ("wrong", "wrong-bg"), ("warn", "warn-bg")]
    lines = [(name, "card") for name in ("blue", "orange", "green", "violet", "red", "teal", "brown", "grey")]
    for least, pairs in ((4.5, texts), (3.0, lines)):
        for first, second in pairs:
            assert contrast(colours[first], colours[second]) >= least, (first, second)


def test_what_is_not_ours_is_unchanged():
    """As the table in vendor/README.md has it."""
    rows = re.findall(
        r"^\| `(\S+)` \| ([0-9a-f]{64}) \|$", (REPORT / "vendor" / "README.md").read_text("utf-8"), flags=re.M
    )
    assert {name for name, _ in rows} == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, sha256 in rows:
        assert hashlib.sha256((REPORT / "vendor" / name).read_bytes()).hexdigest() == sha256
    assert "MIT License" in (REPORT / "vendor" / "LICENSE.uPlot").read_text("utf-8")


def test_same_files_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_unfinished_run_with_one_logged_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_row(7)) + "\n" + '{"step": 8, "lo', encoding="utf-8")
    (tmp_path / "config.yaml").write_text("logging_steps: 7\n")
    page = shown(tmp_path)
    assert "Not finished:" in page.text and len(page.plots()) == 7 and "7" in page.text
    assert any(part.startswith("Only 1 training step was logged (logging_steps: 7)") for part in page.text)
    assert "Held-out evaluation" not in page.text and "Environment" not in page.text


def test_unfinished_run_shows_its_evaluations(tmp_path):
    rows = [{"step": step, "eval_loss": loss, "eval_logps/accuracies": loss} for step, loss in ((0, 0.69), (5, 0.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {"Held-out evaluation", "0.69 → 0.5", "69\u00a0% → 50\u00a0%"} <= set(shown(tmp_path).text)


def test_nothing_logged_yet(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = shown(tmp_path)
    assert "No step has been logged yet." in page.text and not page.plots() and not page.of("script")


def test_users_mistakes(tmp_path, capsys):
    with pytest.raises(UserError, match="no metrics.jsonl here"):
        write_report(tmp_path)
    assert cli(["report", str(tmp_path)]) == 2 and "name the output_dir of a training run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{broken\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match="metrics.jsonl:2: not a JSON object"):
        write_report(tmp_path)


DAMAGES = [b"[1]\n[2]\n", b"{broken\n{}\n", b"\xff\xfe\n{}\n", b"[" * 100_000 + b"\n{}\n"]


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize(
    "name", ["replies.jsonl", "record/rewards.jsonl", "record/pairs.jsonl", "record/warnings.jsonl"]
)
def test_a_damaged_part_is_left_out_and_told(tmp_path, caplog, name, content):
    (make_run(tmp_path) / name).write_bytes(content)
    assert len(shown(tmp_path).plots()) >= 7
    assert f"{Path(name).name}:1: not a JSON object" in caplog.text and "the report shows no" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"[1]\n{}\n", b"\xff\xfe\n{}\n", b"[" * 100_000 + b"\n{}\n", b"{'a\n{}\n"])
def test_what_the_run_wrote_and_is_damaged_is_one_error(tmp_path, name, content):
    (make_run(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*: not a (JSON|YAML) object"):
        write_report(tmp_path)


def test_metrics_keep_finite_points_of_the_lines_that_have_the_key():
    metrics = Metrics()
    for line in ({"step": 1, "loss": 0.5}, {"step": 1, "eval_loss": 0.4}, {"step": 2, "loss": math.nan},
                 {"step": 3, "loss": 0.25}, {"step": 4, "loss": None}):  # fmt: skip
        metrics.take(line)
    assert [list(part) for part in metrics.curves["loss"]] == [[1.0, 3.0], [0.5, 0.25]]
    assert [list(part) for part in metrics.curves["eval_loss"]] == [[1.0], [0.4]]
    assert not metrics.curves["grad_norm"].steps and metrics.last["step"] == 4


def titles(*lines: dict, **told: bool) -> dict:
    metrics = Metrics()
    for line in lines:
        metrics.take(line)
    return {chart.title: chart for chart in curves(metrics.curves, **told)}


def test_what_is_said_of_losses_is_true_of_them():
    """ln 2 and a start of 0 belong to log-sigmoid losses beside a reference that is the policy's start."""
    assert starts_at_ln2({}) and starts_at_ln2({"loss_type": "sigmoid_norm"}) and starts_at_ln2({"loss_type": ["aot"]})
    assert not starts_at_ln2({"loss_type": ["ipo"]}) and not starts_at_ln2({"loss_type": ["sigmoid", "sft"]})
    assert before_note({"loss_type": ["ipo"]}).startswith("Before: the policy still equals the reference")
    assert before_note({"loss_type": ["simpo", "sft"]}).startswith("Without a reference")
    assert "need not begin at 0" in before_note({"ref_model_name_or_path": "other"})
    row = {"step": 1, "loss": 3.0, "losses/simpo": 1.0, "losses/sft": 2.0}
    both = titles(row, starts_at_ln2=False, refers=False)
    assert both["Loss (nats a pair)"].level is None and titles(row)["Loss (nats a pair)"].level[0] == math.log(2)
    assert [line.label for line in both["Parts of the loss (unweighted)"].lines] == ["simpo", "sft"]
    assert "Parts of the loss (unweighted)" not in titles({"step": 1, "loss": 3.0})
    assert "Log-probability of answers (nats, summed)" in titles({"step": 0, "eval_logps/chosen": -9.0})


def test_reward_accuracy_has_no_before():
    summary = {"eval_before": {"eval_rewards/accuracies": 0.0}, "eval_after": {"eval_rewards/accuracies": 0.97}}
    assert headlines(summary, {}, []) == [("97\u00a0%", "held-out pairs that reward the chosen reply more, after")]


def test_a_long_run_gives_a_small_page_and_keeps_its_spike(tmp_path):
    """100,000 logged steps, one of them with a gradient norm of 99."""
    rows = [f'"loss": {0.7 - step / 2e5}, "grad_norm": {99 if step == 77_777 else 2}' for step in range(1, 100_001)]
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "learning_rate",
        "logps/chosen",
    )
    more = "".join(f', "{name}": 0.{place}23456' for place, name in enumerate(names))
    text = "".join(f'{{"step": {step}, {row}{more}}}\n' for step, row in enumerate(rows, 1))
    (tmp_path / "metrics.jsonl").write_text(text)
    path = write_report(tmp_path)
    assert path.stat().st_size < 1_000_000
    page = Page(path.read_text("utf-8"))
    charts = json.loads(page.raw["script"][0])
    lines = [line for chart in charts for line in chart["lines"]]
    loss, norm = lines[0], next(line for line in lines if line["label"] == "gradient norm")
    assert (
        len(norm["x"]) == MOST and max(norm["high"]) == 99 and max(norm["y"]) == pytest.approx(2 + 97 / 200, rel=1e-4)
    )
    assert loss["y"][0] == pytest.approx(0.7 - 100.5 / 2e5, rel=1e-4)  # the mean of the first 200
    assert loss["x"][0] == 101 and sorted(norm["x"]) == norm["x"]


def test_short_curves_are_not_thinned():
    metrics = Metrics()
    for step in range(MOST):
        metrics.take({"step": step, "loss": step * 1.5})
    assert thin(metrics.curves["loss"]) == {"x": list(range(MOST)), "y": [step * 1.5 for step in range(MOST)]}
    metrics.take({"step": MOST, "loss": -7.0})
    thinned = thin(metrics.curves["loss"])
    assert len(thinned["x"]) == MOST and min(thinned["low"]) == -7


def test_tokens_are_coloured_by_how_far_they_moved():
    tokens = [["a", 0.01], ["b", -0.02], ["c", 0.05], ["d", -0.61], ["e", 9.0], ["\n", None], ["f", None]]
    found = coloured({"tokens": tokens})
    assert found["runs"] == [("ab", "c", ""), ("c", "p1", "+0.05"), ("d", "n3", "-0.61"), ("e", "p4", "+9.00"),
                             ("\nf", "", "")]  # fmt: skip
    assert found["moved"] == "“e” +9.00, “d” -0.61, “c” +0.05"


def test_histograms_share_their_bins():
    """Bins of a half for chosen, of a quarter for rejected rewards: all become halves, from −1 to 0.5."""
    row = {"step": 3, "pairs": 4, "margins": [0.0] * 5, "chosen": {"power": -1, "first": 0, "counts": [4]},
           "rejected": {"power": -2, "first": -3, "counts": [1, 0, 3]}}  # fmt: skip
    (picture,) = histograms([row])
    assert picture["bars"]["chosen"] == [(66.67, 0.0, 33.33, 40.0)]
    assert picture["bars"]["rejected"] == [(0.0, 30.0, 33.33, 10.0), (33.33, 10.0, 33.33, 30.0)]
    assert (picture["low"], picture["high"], picture["zero"]) == ("-1", "0.5", 66.67)


def test_replies_of_a_run_under_way_are_grouped_by_prompt():
    rows = [{"step": step, "prompt": prompt, "reply": f"{prompt}{step}"} for step in range(20) for prompt in "ab"]
    first, second = live_replies([{"prompt": "judged", "before": "x", "after": "y"}, *rows])
    assert first["prompt"] == "a" and second["prompt"] == "b"
    assert [step for step, _ in first["replies"]] == [0, 3, 7, 11, 15, 19]
    assert first["replies"][-1] == (19, "a19")
    (long,) = live_replies([{"step": 1, "prompt": "p", "reply": "x" * 5000}])
    assert long["replies"][0][1].endswith("(3500 more characters)")
