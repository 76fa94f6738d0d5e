"""The model card of an exported policy: data, settings, metrics, reference, licence, citation, in the hub's form."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from minimind_dpo.config import TrainConfig
from minimind_dpo.config.names import looks_local
from minimind_dpo.models.origin import CARD, License, Origin, find_origin, license_of

_ALWAYS = (
    "loss_type",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_length",
    "completion_mask",
)
_NOT_OF_THE_MODEL = (
    *("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path", "train_data", "eval_data"),
    *("output_dir", "resume", "report_to", "project", "run_name", "run_group", "tags", "save_steps", "logging_steps"),
    *("save_total_limit", "max_hours", "ddp_timeout", "dataloader_num_workers", "matmul"),
)
_CITATION = """@inproceedings{{rafailov2023direct,
  title={{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
  author={{Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano and
    Finn, Chelsea}},
  booktitle={{Advances in Neural Information Processing Systems}},
  year={{2023}}
}}

@software{{minimind_dpo,
  title={{minimind_dpo: exact, resumable Direct Preference Optimization on Accelerate and DeepSpeed}},
  version={{{version}}}
}}"""


def write_card(source: str, directory: Path) -> None:
    """Write README.md for a model of a run, with its base's licence files; a card that is there goes along otherwise.

    Args:
        source: what was exported.
        directory: the exported model.
    """
    origin = find_origin(source)
    if origin is None:
        if (Path(source).expanduser() / CARD).is_file():
            shutil.copyfile(Path(source).expanduser() / CARD, directory / CARD)
        return
    license = license_of(origin.base)
    for file in license.files:
        shutil.copyfile(file, directory / file.name)
    (directory / CARD).write_text(model_card(origin, license, directory.name), "utf-8")


def model_card(origin: Origin, license: License, name: str) -> str:
    """The text of a card. Local paths are told by their last part only.

    Args:
        origin: of the model.
        license: of its base.
        name: of the model.
    """
    base, settings = origin.base, origin.settings
    data = ModelCardData(
        base_model=None if _is_local(base) else base,
        datasets=[_dataset(name) for name in _names(settings, "train_data") if not _is_local(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license.name,
        license_name=license.own_name,
        license_link=license.link,
        tags=["dpo", "preference-optimization", "minimind-dpo"],
    )
    reference = settings.get("ref_model_name_or_path") or base
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{_linked(base)}, trained further on preference pairs by Direct Preference Optimization "
        f"([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)) with `minimind_dpo` {_version('minimind-dpo')}.",
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        f'chat = pipeline("text-generation", "{name}")\n'
        'chat([{"role": "user", "content": "Hello"}], max_new_tokens=100)\n```',
        "## Training",
        _training(origin, reference),
        "| setting | value |\n|---|---|\n" + "\n".join(f"| `{k}` | {_cell(v)} |" for k, v in _told(settings).items()),
        *_metrics(origin),
        f"## Licence\n\n{_license_text(license, base)}",
        "## Citation\n\n```bibtex\n" + _CITATION.format(version=_version("minimind-dpo")) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _training(origin: Origin, reference: str) -> str:
    summary, settings = origin.summary, origin.settings
    lines = [f"- base model: {_linked(origin.base)}"]
    if digest := summary.get("reference_digest"):
        lines.append(f"- reference: {_linked(reference)} (digest `{digest}`)")
    lines += [f"- training data: {_linked(name, 'datasets/')}" for name in _names(settings, "train_data")]
    lines += [f"- held-out data: {_linked(name, 'datasets/')}" for name in _names(settings, "eval_data")]
    if "steps" in summary:
        lines.append(f"- {summary['steps']} optimizer steps, {summary.get('pairs_seen', 'unknown')} pairs seen")
    packages = ("torch", "transformers", "accelerate")
    return "\n".join([*lines, "- " + ", ".join(f"{name} {_version(name)}" for name in packages)])


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """What a reader would want to know: the main settings, and those that are not as they come."""
    defaults = {field.name: getattr(TrainConfig(), field.name) for field in fields(TrainConfig)}
    return {
        name: value
        for name, value in settings.items()
        if name not in _NOT_OF_THE_MODEL and (name in _ALWAYS or value != defaults.get(name))
    }


def _metrics(origin: Origin) -> list[str]:
    before, after = origin.summary.get("eval_before", {}), origin.summary.get("eval_after", {})
    parts = []
    if names := [name for name in after if name.startswith("eval_")]:
        rows = [f"| `{name}` | {_cell(before.get(name))} | {_cell(after[name])} |" for name in names]
        parts.append("## Held-out metrics of the run\n\n| metric | before | after |\n|---|---|---|\n" + "\n".join(rows))
    intervals = origin.evaluation.get("interval", {})
    numbers = {name: value for name, value in origin.evaluation.items() if isinstance(value, (int, float))}
    if pairs := numbers.pop("pairs", None):
        rows = [f"| `{name}` | {_cell(value)} | {_interval(intervals.get(name))} |" for name, value in numbers.items()]
        head = f"## Evaluation on {pairs} held-out pairs\n\n| metric | value | interval |\n|---|---|---|\n"
        parts.append(head + "\n".join(rows))
    return parts


def _interval(bounds: Any) -> str:
    return "" if bounds is None else f"{bounds[0]:.4g} to {bounds[1]:.4g}"


def _cell(value: Any) -> str:
    text = (
        f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else value
    )
    return str(text).replace("|", "\\|").replace("\n", " ")


def _license_text(license: License, base: str) -> str:
    if license.name is None and not license.files:
        return f"That of the base model, {_linked(base)}: its card was not at hand when this one was written."
    name = license.own_name or license.name or "see " + ", ".join(file.name for file in license.files)
    return f"That of the base model, {_linked(base)}: {name}" + (f" ({license.link})." if license.link else ".")


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _names(settings: dict[str, Any], key: str) -> list[str]:
    sources = settings.get(key) or []
    sources = sources if isinstance(sources, list) else [sources]
    return [str(source["path"]) if isinstance(source, dict) else str(source) for source in sources]


def _is_local(name: str) -> bool:
    return not name or Path(name).expanduser().exists() or looks_local(_dataset(name)) or "*" in name


def _dataset(name: str) -> str:
    """The id in `owner/name[/config][@revision][:split]`."""
    path = name.split("@")[0].split(":")[0]
    return "/".join(path.split("/")[:2]) if not path.startswith(("/", ".", "~")) else path


def _linked(name: str, kind: str = "") -> str:
    if _is_local(name):
        return f"`{Path(name).name}`" if name else "a base model that is not named"
    return f"[{name}](https://huggingface.co/{kind}{_dataset(name)})"
