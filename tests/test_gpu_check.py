"""`make gpu-check` rehearsed on the CPU: its stages run, its checks can fail, and what becomes of one that dies."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_forks import Forks
from helpers_run import REPOSITORY

sys.path.insert(0, str(REPOSITORY))  # `benchmarks` is no part of the installed package

from benchmarks.gpu_check import __main__ as program  # noqa: E402
from benchmarks.gpu_check import engines, kernels, speed, stages  # noqa: E402
from benchmarks.gpu_check.notes import FAILED, RIGHT, SKIPPED, WRONG, Notes, Place, verdict  # noqa: E402
from minimind_dpo.data.batch import pack_pairs  # noqa: E402
from minimind_dpo.models.fast.attention import pair_attention  # noqa: E402
from minimind_dpo.objective import step as scoring  # noqa: E402


def rehearse(name: str, tmp_path: Path) -> dict[str, Any]:
    """What a stage finds on the CPU, in this process."""
    file, scratch = tmp_path / f"{name}.json", tmp_path / "scratch"
    scratch.mkdir()
    importlib.import_module(f"benchmarks.gpu_check.{name}").run(Notes(file), Place("cpu", True, scratch, tmp_path))
    return json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("name", ["kernels", "waits", "nccl"])
def test_stages_find_all_right(name: str, tmp_path: Path) -> None:
    found = rehearse(name, tmp_path)
    assert verdict(found, True) == RIGHT and found["checks"], found


def test_speed_has_a_row_a_contestant(tmp_path: Path) -> None:
    """With the ceiling that an earlier stage measured; the slower contestants make more of a step."""
    (tmp_path / "machine.json").write_text(json.dumps({"figures": {"bf16 TFLOP/s": 2.0}}), "utf-8")
    found = rehearse("speed", tmp_path)
    assert verdict(found, True) == RIGHT and len(found["checks"]) == 4
    rows = {name.removeprefix("tiny, "): row for name, row in found["figures"].items()}
    assert rows.keys() == {*speed.LAYOUTS, "transformers, padded", "times as fast by"}
    for name in (*speed.LAYOUTS, "transformers, padded"):
        assert rows[name]["ms a pair"] > 0 and rows[name]["launches"] > 100
        assert rows[name]["of the ceiling"] == pytest.approx(rows[name]["effective TFLOP/s"] / 2, rel=1e-3)
    product = rows["times as fast by"]["kernels"] * rows["times as fast by"]["packing"]
    assert product * rows["times as fast by"]["sharing"] == pytest.approx(rows["times as fast by"]["all"], rel=5e-3)


def test_engines_end_alike(tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stage starts is forked here, as the launcher would have it."""
    monkeypatch.setattr(engines, "AT_ONCE", 1)
    monkeypatch.setattr(engines, "STEPS", 2)

    def forked(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        first, second = (index for index, word in enumerate(words) if word == "-m")
        assert words[first + 1] == "minimind_dpo.launch" and words[second + 1] == "minimind_dpo.train"
        launcher = dict(zip(words[first + 2 : second : 2], words[first + 3 : second : 2], strict=True))
        directory = tmp_path / Path(launcher["--config_file"]).stem
        directory.mkdir()
        engine = f"{directory.name} --num_processes {launcher['--num_processes']}"
        code = max(forks.run(words[second + 2 :], directory, engine))
        return subprocess.CompletedProcess(words, code, "", (directory / "log").read_text("utf-8"))

    monkeypatch.setattr(engines.subprocess, "run", forked)
    found = rehearse("engines", tmp_path)
    assert verdict(found, True) == RIGHT and len(found["checks"]) == 5, found
    losses = found["figures"]["losses"]
    assert losses.keys() == {"single_cpu", "ds_zero2_cpu"} and losses["single_cpu"][1] < losses["single_cpu"][0]


def test_peers_are_timed_beside_ours(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    (tmp_path / "speed.json").write_text(json.dumps({"figures": {"tiny, ours": {"ms a pair": 1e3}}}), "utf-8")
    found = rehearse("peers", tmp_path)
    assert verdict(found, True) == RIGHT and len(found["checks"]) == 1, found
    row = found["figures"]["tiny"]
    assert row["ours is so many times as fast"] == pytest.approx(row["ms a pair"] / 1e3, rel=0.01)


def test_unshared_rows_compute_every_prompt_twice() -> None:
    row = {"chosen_input_ids": [4, 4, 4, 5, 5], "rejected_input_ids": [4, 4, 4, 6, 6, 6]}
    row |= {
        f"{side}_completion_mask": [0, 0, 0, 1, 1, 1][: len(row[f"{side}_input_ids"])]
        for side in ("chosen", "rejected")
    }
    shared, apart = pack_pairs([row]), speed.unshared([row])
    assert (shared.num_tokens, apart.num_tokens) == (3 + 1 + 2, 4 + 5)
    assert apart.input_ids.tolist() == [[4, 4, 4, 5, 4, 4, 4, 6, 6]]
    assert apart.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert apart.target_ids.tolist() == [5, 5, 6, 6, 6] and apart.logit_positions.tolist() == [2, 3, 6, 7, 8]


def test_attention_that_is_off_is_found(tmp_path: Path) -> None:
    """A branch that sees one more token than it should, in one pair of six."""

    def leaking(*states: Any, **told: Any) -> Any:
        output, none = pair_attention(*states, **told)
        segment = told["pair_segments"][1]
        first = segment.start + segment.prefix + segment.chosen
        return torch.cat([output[:, :first], output[:, first + 1 : first + 2], output[:, first + 1 :]], dim=1), none

    with mock.patch.object(kernels, "pair_attention", leaking):
        found = rehearse("kernels", tmp_path)
    assert verdict(found, True) == WRONG
    assert [check["right"] for check in found["checks"]] == [False] * 4


def test_a_step_that_reads_a_number_is_found(tmp_path: Path) -> None:
    honest = scoring.sum_per_side

    def reading(*given: Any) -> Any:
        sums = honest(*given)
        assert float(sums[0].sum()) <= 0
        return sums

    with mock.patch.object(scoring, "sum_per_side", reading):
        found = rehearse("waits", tmp_path)
    assert [check["right"] for check in found["checks"]] == [False, False]
    assert "_local_scalar_dense" in found["checks"][0]["said"]


def test_a_stage_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--out", str(tmp_path), "--stages", "machine", "--rehearse"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))["machine"]
    assert summary == json.loads((tmp_path / "machine.json").read_text("utf-8"))
    assert summary["verdict"] == RIGHT and summary["figures"]["fp32 TFLOP/s"] > 0
    assert summary["figures"]["versions"]["torch"] == torch.__version__
    assert "all that could be checked is right" in capsys.readouterr().out


def test_one_that_dies_hangs_or_lacks_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is said, and none but the last is taken for right."""
    options = program.parse(["--out", str(tmp_path), "--rehearse"])
    slow = program.attempt(stages.Stage("machine", 0.1, (), "slow"), options, 400)
    assert (slow["verdict"], slow["said"]) == (FAILED, "took more than 1 s")
    absent = program.attempt(stages.Stage("absent", 60, (), "dies"), options, 400)
    assert absent["verdict"] == FAILED and absent["said"].startswith("ended with 2: ") and "absent" in absent["said"]
    assert program.attempt(stages.STAGES[0], options, 0)["verdict"] == FAILED
    lacking = program.attempt(stages.Stage("machine", 60, ("no_such_package",), "lacks"), options, 400)
    assert (lacking["verdict"], lacking["said"]) == (SKIPPED, "not installed: no_such_package")
    with mock.patch.object(program, "attempt", lambda *_: slow), mock.patch.object(program, "SECONDS", 0):
        assert program.main(["--out", str(tmp_path), "--stages", "nccl", "--rehearse"]) == 1
    assert "wrong: nccl" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_stages_fit_into_eight_minutes() -> None:
    """Together they are cut off before; each of them is a module with a row in docs/gpu.md."""
    assert stages.SECONDS < 480
    table = (REPOSITORY / "docs" / "gpu.md").read_text("utf-8")
    for stage in stages.STAGES:
        assert (REPOSITORY / "benchmarks" / "gpu_check" / f"{stage.name}.py").is_file()
        assert f"| `{stage.name}` |" in table
