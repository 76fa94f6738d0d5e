"""Trackers, each run for real and read back with its own reader: every number once, in order, also over a kill."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from helpers_forks import Bomb, Forks
from helpers_run import Inputs, lines, same_bits, train_here
from test_wandb import history_of
from transformers.integrations.integration_utils import rewrite_logs

from minimind_dpo.checkpoints.state import STATE, TrainerState, read_state
from minimind_dpo.config import load_config
from minimind_dpo.engine import trackers as guard
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.errors import UserError
from minimind_dpo.tracking.held import held_by
from minimind_dpo.tracking.names import told
from minimind_dpo.tracking.records import read_records
from minimind_dpo.tracking.trackers import start_trackers

ALL = ("wandb", "tensorboard", "mlflow", "trackio", "swanlab")
HERE = [name for name in ALL if importlib.util.find_spec(name)]
needed = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in HERE, reason=f"{name} is not installed (it does not go with every pin of constraints.txt)"
            ),
        )
        for name in ALL
    ],
)
MEASURED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}  # not the same in a step made again
Points = dict[str, list[tuple[int, float]]]  # by name, (step, value) in the order that the tracker has


def places(directory: Path) -> dict[str, str]:
    """Variables by which each tracker keeps a run below `directory`."""
    return {
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory / 'mlflow.db'}",
        "TRACKIO_DIR": str(directory / "trackio"),
    }


def read_wandb(directory: Path) -> Points:
    points = defaultdict(list)
    for path in sorted((directory / "run").glob("wandb/offline-run-*/run-*.wandb")):
        for step, row in history_of(path).items():
            for name, value in row.items():
                points[name].append((step, value))
    return {name: taken for name, taken in points.items() if not name.startswith("_")}


def read_tensorboard(directory: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "run/tensorboard/minimind_dpo"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "/" in tag
    }


def mlflow_run(directory: Path) -> tuple[Any, Any]:
    import mlflow

    client = mlflow.MlflowClient(places(directory)["MLFLOW_TRACKING_URI"])
    (experiment,) = client.search_experiments(filter_string="name = 'minimind_dpo'")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def read_mlflow(directory: Path) -> Points:
    client, run = mlflow_run(directory)
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def read_trackio(directory: Path) -> Points:
    points = defaultdict(list)
    with sqlite3.connect(directory / "trackio/minimind_dpo.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    for _, step, values in rows:
        for name, value in json.loads(values).items():
            points[name].append((step, value))
    return points


def read_swanlab(directory: Path) -> Points:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    points = defaultdict(list)
    for path in sorted((directory / "run").glob("swanlog/run-*/run-*.swanlab")):
        for data in read_records(path):
            scalar = Record.FromString(data).scalar
            if scalar.key:
                points[scalar.key].append((scalar.step, scalar.value.number))
    return points


READERS = {
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "swanlab": read_swanlab,
}


def flags_of(inputs: Inputs, run: Path, **options: Any) -> list[str]:
    """A run of 11 steps that is evaluated and saved every third."""
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "eval_steps": 3, "save_steps": 3}
    return inputs.flags(run, eval_data=inputs.eval_data, **shape | options)


@pytest.fixture(scope="module")
def tracked(inputs: Inputs, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that told every tracker at once, killed after step 8 (its last checkpoint: 6), and gone on with."""
    directory = tmp_path_factory.mktemp("tracked")
    flags = [*flags_of(inputs, directory / "run", run_name="named", run_group="ours"), "--report_to", *HERE]
    flags += ["--tags", "first", "tiny"]
    killed = forks.run(flags, directory, bomb=Bomb("training.loop", "_log_step", 8, "after"), **places(directory))
    assert killed == [-signal.SIGKILL], (directory / "log").read_text("utf-8")
    assert [line["step"] for line in lines(directory / "run")][-1] == 8
    assert forks.run(flags, directory, **places(directory)) == [0], (directory / "log").read_text("utf-8")
    return directory


@needed
def test_every_number_is_there_once_and_in_order(tracked: Path, name: str) -> None:
    """The names are those of TRL's runs: what transformers' own callback makes of them."""
    expected = defaultdict(list)
    for line in lines(tracked / "run"):
        places = {} if "eval_loss" in line and line["step"] else {"global_step": line["step"]}
        left_out = {"step", *(() if places or not line["step"] else ("epoch", "pairs_seen"))}
        values = {key: value for key, value in line.items() if key not in left_out} | places
        if name in ("tensorboard", "mlflow"):
            values.pop("global_step", None)
        for key, value in (values if name == "mlflow" else rewrite_logs(values)).items():
            expected[key].append((line["step"], value))
    points = READERS[name](tracked)
    assert points.keys() >= {"loss", "eval_loss"} if name == "mlflow" else {"train/loss", "eval/rewards/margins"}
    assert points.keys() == expected.keys()
    for key, values in expected.items():
        assert [step for step, _ in points[key]] == [step for step, _ in values], key
        if key.removeprefix("train/") not in MEASURED:
            assert [value for _, value in points[key]] == pytest.approx([value for _, value in values], rel=1e-6), key
    assert [step for step, _ in expected["eval_loss" if name == "mlflow" else "eval/loss"]] == [0, 3, 6, 9, 11]


def test_trackers_leave_the_run_as_it_is(tracked: Path, inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """The same bits as a run that tells nobody and was not killed."""
    assert forks.run(flags_of(inputs, tmp_path / "run"), tmp_path) == [0]
    assert same_bits(tracked / "run", tmp_path / "run")


def test_wandb_is_told_name_group_and_tags(tracked: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for path in (tracked / "run").glob("wandb/offline-run-*/run-*.wandb"):
        for record in map(Record.FromString, read_records(path)):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.display_name, record.run.run_group) == ("named", "ours")
                assert list(record.run.tags) == ["first", "tiny"]


@pytest.mark.skipif("mlflow" not in HERE, reason="mlflow is not installed")
def test_mlflow_is_told_name_group_tags_and_settings(tracked: Path) -> None:
    _, run = mlflow_run(tracked)
    assert run.info.run_name == "named" and run.info.status == "FINISHED"
    assert (run.data.tags["group"], run.data.tags["tags"]) == ("ours", "first, tiny")
    assert (run.data.params["beta"], run.data.params["tags"]) == ("0.5", '["first", "tiny"]')


@pytest.mark.skipif("tensorboard" not in HERE, reason="tensorboard is not installed")
def test_tensorboard_has_the_settings_once(tracked: Path) -> None:
    (settings,) = (tracked / "run").rglob("hparams.yml")
    assert "beta: 0.5" in settings.read_text("utf-8")


@pytest.mark.skipif("trackio" not in HERE, reason="trackio is not installed")
def test_trackio_is_told_name_and_group(tracked: Path) -> None:
    with sqlite3.connect(tracked / "trackio/minimind_dpo.db") as database:
        ((name, config),) = database.execute("select run_name, config from configs").fetchall()
    told = json.loads(config)
    assert (name, told["_Group"], told["tags"], told["beta"]) == ("named", "ours", ["first", "tiny"], 0.5)


@pytest.mark.skipif("swanlab" not in HERE, reason="swanlab is not installed")
def test_swanlab_is_told_name_group_and_tags(tracked: Path) -> None:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    starts = [
        Record.FromString(data).start
        for path in (tracked / "run").glob("swanlog/run-*/run-*.swanlab")
        for data in read_records(path)
        if Record.FromString(data).HasField("start")
    ]
    assert len(starts) >= 1 and {(s.project, s.name, s.group) for s in starts} == {("minimind_dpo", "named", "ours")}
    assert all(list(start.tags) == ["first", "tiny"] for start in starts)


COLUMNS = ["step", "prompt", "reply"]
ROWS = [[2, "2 | 3?", "<b>five</b>\nor so"], [2, "你好", "hello"]]


@pytest.fixture(scope="module")
def with_tables(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two tables, the later one told twice: by a session that was killed, and by one that goes on from step 3."""
    directory = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patched:
        for variable, value in places(directory).items():
            patched.setenv(variable, value)
        patched.chdir(directory)  # below it mlflow keeps files
        config = load_config([*inputs.flags(directory / "run"), "--report_to", *HERE])
        state = TrainerState()
        for session in range(2):
            state.step = 3 * session
            engine = start_engine(config)
            trackers = start_trackers(config, engine, state, [])
            if not session:
                trackers.table("replies", COLUMNS, ROWS, 2)
            trackers.table("replies", COLUMNS, ROWS[1:], 5)
            engine.end()
        yield directory


def tables_of_wandb(directory: Path) -> list[Any]:
    found = []
    for path in sorted((directory / "run").glob("wandb/offline-run-*/run-*.wandb")):
        for step, row in history_of(path).items():
            if "replies/path" in row:
                table = json.loads((path.parent / "files" / row["replies/path"]).read_text("utf-8"))
                assert table["columns"] == COLUMNS and row["train/global_step"] == step
                found.append((step, table["data"]))
    return found


def tables_of_tensorboard(directory: Path) -> list[Any]:
    """By the reader of TensorBoard's own page."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "run/tensorboard/minimind_dpo")).Reload()
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("replies/text_summary")]


def tables_of_mlflow(directory: Path) -> list[Any]:
    client, run = mlflow_run(directory)
    found = []
    for file in client.list_artifacts(run.info.run_id, "replies"):
        table = json.loads(Path(client.download_artifacts(run.info.run_id, file.path)).read_text("utf-8"))
        found.append((int(Path(file.path).stem.removeprefix("step-")), table["data"]))
    return found


def tables_of_trackio(directory: Path) -> list[Any]:
    with sqlite3.connect(directory / "trackio/minimind_dpo.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    tables = [(step, json.loads(values)["replies"]) for step, values in rows if b"replies" in values]
    return [(step, [[row[column] for column in COLUMNS] for row in table["_value"]]) for step, table in tables]


def tables_of_swanlab(directory: Path) -> list[Any]:
    files = sorted((directory / "run").glob("swanlog/run-*/media/echarts/*.json"))
    charts = [(int(file.name.split("-")[0]), file.read_text("utf-8")) for file in files]
    return [
        (step, [row for row in ROWS if json.dumps(row[1])[1:-1] in chart or row[1] in chart]) for step, chart in charts
    ]


TABLES = {
    "wandb": tables_of_wandb,
    "tensorboard": tables_of_tensorboard,
    "mlflow": tables_of_mlflow,
    "trackio": tables_of_trackio,
    "swanlab": tables_of_swanlab,
}
IN_MARKDOWN = [
    "| step | prompt | reply |\n| --- | --- | --- |\n| 2 | 2 &#124; 3? | &lt;b>five&lt;/b><br>or so |\n"
    "| 2 | 你好 | hello |",
    "| step | prompt | reply |\n| --- | --- | --- |\n| 2 | 你好 | hello |",
]


@needed
def test_a_table_is_shown_once(with_tables: Path, name: str) -> None:
    texts = IN_MARKDOWN if name == "tensorboard" else [ROWS, ROWS[1:]]
    assert TABLES[name](with_tables) == [(2, texts[0]), (5, texts[1])]


class Notes(GeneralTracker):
    """A tracker that fails at some steps."""

    name = "notes"
    requires_logging_directory = False
    fails: set[int] = set()
    kept: list[int] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        if step in self.fails:
            raise ConnectionError("nobody answers")
        self.kept.append(step)

    def finish(self) -> None:
        if self.fails:
            raise ConnectionError("nobody answers")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Notes]]:
    monkeypatch.setattr(Notes, "kept", [])
    monkeypatch.setattr(Notes, "fails", set())
    Notes.__init__ = lambda self, project: GeneralTracker.__init__(self)  # type: ignore[method-assign]
    register_tracker_class(Notes)
    yield Notes
    del LOGGER_TYPE_TO_CLASS["notes"]


def test_a_tracker_that_is_lost_stops_nothing(
    notes: type[Notes], inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From step 3 on it takes nothing: the run is that without it, and says so once."""
    notes.fails = set(range(3, 100))
    assert train_here(flags_of(inputs, tmp_path / "lost", report_to="notes")) == 0
    assert train_here(flags_of(inputs, tmp_path / "alone")) == 0
    assert same_bits(tmp_path / "lost", tmp_path / "alone")
    assert notes.kept == [0, 1, 2] and lines(tmp_path / "lost")[-1]["step"] == 11
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in warnings if "notes" in text] == [
        "report_to: notes failed (ConnectionError: nobody answers); the run goes on, its numbers are in metrics.jsonl "
        "and are sent again later"
    ]


def test_what_a_tracker_missed_is_sent_once_it_answers(
    notes: type[Notes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left alone for a minute, then for two; what waited comes first, in order."""
    now = 100.0
    monkeypatch.setattr(guard.time, "monotonic", lambda: now)
    tracker = guard.Guarded(notes("p"))

    def tell(step: int) -> None:
        tracker.tell(lambda own: own.log({}, step=step))

    notes.fails = {1}
    for step in range(3):
        tell(step)
    assert notes.kept == [0]
    now += 61
    tell(3)
    now += 119
    notes.fails = set()
    tell(4)
    assert notes.kept == [0]
    now += 2
    tell(5)
    assert notes.kept == [0, 1, 2, 3, 4, 5]
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1


def test_a_message_that_is_never_taken_is_given_up(notes: type[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_FIRST_PAUSE", 0.0)
    monkeypatch.setattr(guard, "_LONGEST_PAUSE", 0.0)
    tracker = guard.Guarded(notes("p"))
    notes.fails = {1}
    for step in range(5):
        tracker.tell(lambda own, step=step: own.log({}, step=step))
    assert notes.kept == [0, 2, 3, 4]


def test_a_tracker_added_on_a_resume_gets_the_whole_run(notes: type[Notes], inputs: Inputs, tmp_path: Path) -> None:
    assert train_here(flags_of(inputs, tmp_path, max_steps=6)) == 0
    assert train_here(flags_of(inputs, tmp_path, report_to="notes", max_steps=9)) == 0
    assert sorted(set(notes.kept)) == list(range(10)) and notes.kept == sorted(notes.kept)


def test_the_service_of_wandb_dies_amid_a_run(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """A real process of W&B is killed: one warning, and the bits of a run without it."""
    started = forks.start(flags_of(inputs, tmp_path / "run", report_to="wandb", num_train_epochs=4), tmp_path)
    run = psutil.Process(started.pids[0])
    started.wait_until(lambda: (tmp_path / "run/metrics.jsonl").is_file() and len(lines(tmp_path / "run")) > 3)
    services = [child for child in run.children(recursive=True) if "wandb-core" in " ".join(child.cmdline())]
    assert services
    for service in services:
        service.kill()
    assert started.wait() == [0], (tmp_path / "log").read_text("utf-8")
    log = (tmp_path / "log").read_text("utf-8")
    assert log.count("report_to: wandb failed") == 1 and "Traceback" not in log, log
    assert forks.run(flags_of(inputs, tmp_path / "alone", num_train_epochs=4), tmp_path) == [0]
    assert same_bits(tmp_path / "run", tmp_path / "alone")


def test_a_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(UserError) as error:
        guard.check_trackers(["swanlab", "wandb", "tensorboard"])
    assert str(error.value).splitlines() == [
        "report_to: swanlab is not installed (pip install 'minimind-dpo[swanlab]')",
        "report_to: tensorboard is not installed (pip install 'minimind-dpo[tensorboard]')",
    ]


def test_a_checkpoint_of_before_there_were_several_trackers(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text('{"step": 3, "tracker_run_id": "abc"}')
    assert read_state(tmp_path).tracker_run_ids == {"wandb": "abc"}
    (tmp_path / STATE).write_text('{"step": 3, "tracker_run_id": null}')
    assert read_state(tmp_path).tracker_run_ids == {}


def test_names_of_an_evaluation_beside_a_step() -> None:
    line = {"step": 4, "epoch": 0.5, "pairs_seen": 8, "eval_loss": 0.25, "eval_rewards/margins": None}
    assert told("wandb", line, has_places=True) == {"eval/loss": 0.25}
    assert told("mlflow", line, has_places=False) == {"epoch": 0.5, "pairs_seen": 8, "eval_loss": 0.25}


def test_wandb_online_is_asked_for_its_last_step(tmp_path: Path) -> None:
    own = SimpleNamespace(tracker=SimpleNamespace(offline=False, starting_step=4))
    has = held_by("wandb", own, tmp_path, set())
    assert [step for step in range(6) if has(step, "train/loss")] == [0, 1, 2, 3]


def test_a_tracker_that_cannot_be_asked_is_taken_to_have_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    has = held_by("wandb", SimpleNamespace(tracker=None), tmp_path, {(2, "train/loss")})
    assert has(2, "train/loss") and not has(3, "train/loss")
    assert "what wandb has of the run can't be read" in caplog.text


@pytest.mark.skipif("tensorboard" not in HERE, reason="tensorboard is not installed")
def test_tensorboard_forgets_a_run_that_begins_again(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """Killed before its first checkpoint, it starts from the first step."""
    flags = inputs.flags(tmp_path / "run", report_to="tensorboard")
    assert forks.run(flags, tmp_path, bomb=Bomb("training.loop", "_log_step", 2, "after")) == [-signal.SIGKILL]
    assert forks.run(flags, tmp_path) == [0]
    points = read_tensorboard(tmp_path)["train/loss"]
    assert [step for step, _ in points] == [1, 2, 3]
    assert [value for _, value in points] == pytest.approx([line["loss"] for line in lines(tmp_path / "run")], rel=1e-6)
