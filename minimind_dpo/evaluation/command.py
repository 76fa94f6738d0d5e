"""An evaluation from its settings to its figures, on all ranks together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minimind_dpo.config import TrainConfig
from minimind_dpo.config.data import named_sets
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.data.raw import column_values
from minimind_dpo.data.sources import Source
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.engine.ranks import main_first, on_main, stop_together
from minimind_dpo.evaluation.figures import figures
from minimind_dpo.evaluation.pairs import LOSS, PairValues, Stored, pair_values
from minimind_dpo.evaluation.scoring import Judge, compare_digest
from minimind_dpo.evaluation.subject import Subject
from minimind_dpo.evaluation.text import as_text, replies_as_text
from minimind_dpo.files import write_text, writing
from minimind_dpo.objective.sums import PAIR_COLUMNS
from minimind_dpo.reference.digest import reference_digest
from minimind_dpo.training.data import configured_prompts, held_out_sets, tokenizer_path
from minimind_dpo.training.fitting import check_fits, check_loss, check_reference_tokenizer
from minimind_dpo.training.replies import REPLY_VALUES, reply_metrics
from minimind_dpo.training.session import Session
from minimind_dpo.training.settle import settle
from minimind_dpo.training.setup import configured_preference
from minimind_dpo.training.weights import load_configured, load_reference_start


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for, beside the settings of its model, data and loss.

    Attributes:
        subject: the model.
        baseline: another model to compare it with; by default the reference of the run that it comes from.
        by: a column whose values divide the pairs into groups.
        pairs: a file for the values of each pair.
        as_json: print one JSON object.
    """

    subject: Subject
    baseline: str | None = None
    by: str | None = None
    pairs: str | None = None
    as_json: bool = False


def run_evaluation(config: TrainConfig, asked: Asked, session: Session, out: TextIO) -> None:
    """Evaluate and print to `out`. Collective.

    Raises:
        UserError: a mistake in the settings, the data or the files named.
        StoppedEarly: a signal to any rank; the same command goes on there.
    """
    engine = session.engine
    config = settle(config, engine)
    tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
    with main_first(engine, "tokenize", session.stop.signalled, config.ddp_timeout) as go_on:
        sets = held_out_sets(config, tokenizer, go_on)
    stop_together(engine, session.stop.signalled, "before the first pair")
    for data in sets.values():
        check_loss(config.loss_type, data, "--data")
    judge = Judge(engine, sets, configured_prompts(config, sets, tokenizer), session.stop.signalled)
    model = _score_model(config, judge, tokenizer)
    baseline = _score_baseline(config, asked, judge, tokenizer)
    on_main(engine, partial(_tell, config, asked, sets, model, baseline, out))


class Answers(NamedTuple):
    """What a model is asked for: log-probabilities of each set, and its replies."""

    stored: dict[str, Stored]
    replies: list[dict[str, Any]]


def _score_model(config: TrainConfig, judge: Judge, tokenizer: Any) -> Answers:
    with judge.engine.loading_reference(offload=False):
        model = load_configured(config, config.model_name_or_path)
    check_fits((model,), tokenizer, judge.sets.values(), config.max_length)
    digest = reference_digest(model, judge.engine.weights_dtype)
    scorer = judge.ready(config, model)
    answers = Answers(
        judge.stored(config, digest, scorer, squares=config.use_weighting), judge.replies(config, scorer, tokenizer)
    )
    judge.engine.release(scorer)
    return answers


def _score_baseline(config: TrainConfig, asked: Asked, judge: Judge, tokenizer: Any) -> Answers | None:
    """The same of the baseline; None where there is none."""
    theirs = baseline_config(config, asked)
    if theirs is None:
        return None
    if asked.baseline is not None:
        check_reference_tokenizer(asked.baseline, tokenizer, judge.sets.values(), "--baseline")
    with judge.engine.loading_reference(offload=False):
        model = load_reference_start(theirs, judge.engine)
    check_fits((model,), tokenizer, judge.sets.values(), config.max_length)
    digest = compare_digest(judge.engine, model, None if asked.baseline else asked.subject.reference_digest)
    scorer = judge.ready(theirs, model)
    answers = Answers(judge.stored(theirs, digest, scorer), judge.replies(config, scorer, tokenizer))
    judge.engine.release(scorer)
    return answers


def baseline_config(config: TrainConfig, asked: Asked) -> TrainConfig | None:
    """The configuration whose reference is the baseline."""
    if asked.baseline is not None:
        return replace(config, ref_model_name_or_path=asked.baseline)
    if asked.subject.run is None:
        return None
    numerics = {name: getattr(config, name) for name in ("matmul", "weight_rounding", "attn_implementation")}
    return replace(asked.subject.run, **numerics)


def _tell(
    config: TrainConfig,
    asked: Asked,
    sets: Mapping[str, TokenizedData],
    model: Answers,
    baseline: Answers | None,
    out: TextIO,
) -> None:
    """Make the figures of every set, print them and write the pairs' values."""
    preference, sources = configured_preference(config), named_sets(config.eval_data)
    results, lines = {}, []
    for name, data in sets.items():
        theirs = None if baseline is None else baseline.stored[name].logps
        values = pair_values(data, model.stored[name], theirs, preference, asked.subject.running_logits)
        source: Sequence[Source] = sources.get(name, config.train_data)  # the latter with eval_split
        groups = None if asked.by is None else column_values(source, data, asked.by)
        results[name] = figures(values, groups, config.seed)
        lines += _pair_lines(name, data, values, groups)
    if asked.pairs is not None:
        path = Path(asked.pairs).expanduser()
        with writing(path, "--pairs"):
            write_text(path, "".join(lines))
    named = {"model": config.model_name_or_path, "baseline": _baseline_name(config, asked)}
    if asked.as_json:
        told = {name: dict.fromkeys((LOSS, *PAIR_COLUMNS)) | result for name, result in results.items()}
        found = told[""] if "" in told else {"sets": told}
        print(json.dumps(named | found | _told_replies(model, baseline), ensure_ascii=False), file=out, flush=True)
        return
    text = [f"model: {named['model']}\nbaseline: {named['baseline'] or 'none, so neither rewards nor drift'}"]
    text += [as_text(name, result) for name, result in results.items()]
    if model.replies:
        text.append(replies_as_text(_told_replies(model, baseline), shutil.get_terminal_size((110, 40)).columns))
    print("\n\n".join(text), file=out, flush=True)


def _told_replies(model: Answers, baseline: Answers | None) -> dict[str, Any]:
    """`replies`: each prompt with what both answer; `reply_means` of each; nothing where no prompt was asked."""
    if not model.replies:
        return {}
    both = {"model": model.replies} if baseline is None else {"baseline": baseline.replies, "model": model.replies}
    replies = [
        {"prompt": told[0]["prompt"]}
        | dict(zip(both, ({name: each[name] for name in REPLY_VALUES} for each in told), strict=True))
        for told in zip(*both.values(), strict=True)
    ]
    means = {who: reply_metrics(told) for who, told in both.items()}
    short = {who: {name.rpartition("/")[2]: mean for name, mean in told.items()} for who, told in means.items()}
    return {"replies": replies, "reply_means": short}


def _baseline_name(config: TrainConfig, asked: Asked) -> str | None:
    theirs = baseline_config(config, asked)
    return None if theirs is None else theirs.ref_model_name_or_path or theirs.model_name_or_path


def _pair_lines(name: str, data: TokenizedData, values: PairValues, groups: list[str] | None) -> list[str]:
    """A JSON line for each pair: where it stands, and its values."""
    lines = []
    for index in range(len(data)):
        row = data.dataset[index]
        line: dict[str, Any] = {"set": name} if name else {}
        line |= {"place": row["place"], "id": row["id"]} | ({} if groups is None else {"group": groups[index]})
        line |= {metric: float(column[index]) for metric, column in values.metrics.items()}
        line |= {
            "chosen_tokens": int(values.chosen_tokens[index]),
            "rejected_tokens": int(values.rejected_tokens[index]),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines
