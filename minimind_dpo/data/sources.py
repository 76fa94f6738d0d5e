"""What a user may name as data: files, globs, folders, directories saved by `datasets`, hub ids; a mixture of them."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minimind_dpo.config.names import looks_local
from minimind_dpo.data.rows import PACKED, SUFFIXES, DataFile, count_rows, kind_of, read_rows
from minimind_dpo.errors import UserError

__all__ = ["DataFile", "count_rows", "find_files", "read_rows"]

logger = logging.getLogger("minimind_dpo")

Source = str | dict[str, Any]  # a name, or {"path": name, "weight": number}

_HUB_ID = re.compile(r"(?P<id>[^/:@]+/[^/:@]+)(/(?P<config>[^/:@]+))?(@(?P<revision>[^:]+))?(:(?P<split>[^:@]+))?")
# A word anywhere in the name of a file or of a folder that it is in: `dpo_train.jsonl`, `default/test/0000.parquet`.
_SPLITS = re.compile(
    r"(?<![a-z])(train|test|validation|valid|val|evaluation|eval|dev|held[-_ ]?out|hold[-_ ]?out)"
    r"(?:ing|set|data|split)?(?![a-z])"
)
_noticed: set[Path] = set()
_SAVED = ("dataset_dict.json", "state.json")
_ACCEPTED = "a .jsonl, .json, .csv or .parquet file (the first three also .gz), a glob, a folder of them"


def find_files(source: Source | Sequence[Source]) -> list[DataFile]:
    """The files of a source, or of a list of sources in their order; the matches of a glob are sorted by name.

    Raises:
        UserError: nothing is found, or it is not of an accepted kind.
    """
    sources = [source] if isinstance(source, str | dict) else list(source)
    if not sources:
        raise UserError(f"no data given: name {_ACCEPTED}, a directory saved by datasets, or a hub id")
    found = []
    for number, item in enumerate(sources):
        name, weight = (item["path"], item.get("weight", 1.0)) if isinstance(item, dict) else (str(item), 1.0)
        found += [replace(file, weight=float(weight), source=number) for file in _find(name)]
    return found


def _find(name: str) -> list[DataFile]:
    path = Path(name).expanduser()
    if path.is_file():
        return [_data_file(path)]
    if path.is_dir():
        return _directory(path, None)
    if glob.has_magic(name):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(f"{name}: no file matches this pattern (looked from {Path.cwd()})")
        return [_data_file(Path(match)) for match in matches]
    folder, colon, split = name.rpartition(":")
    if colon and Path(folder).expanduser().is_dir():
        return _directory(Path(folder).expanduser(), split)
    hub_id = _HUB_ID.fullmatch(name)
    if not hub_id or looks_local(hub_id["id"]) or path.suffix in (*SUFFIXES, PACKED):
        raise UserError(
            f"{name}: no such file or directory (looked from {Path.cwd()}); data is {_ACCEPTED}, a directory "
            "saved by datasets, or a hub id owner/name[/config][@revision][:split]"
        )
    return [_hub_dataset(name, **hub_id.groupdict())]


def _data_file(path: Path) -> DataFile:
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{path}: unknown kind of file '{''.join(path.suffixes[-2:])}'; data files end in {', '.join(SUFFIXES)}, "
            f"those of text perhaps in {PACKED} after it"
        )
    return DataFile(str(path), kind)


def _directory(path: Path, split: str | None) -> list[DataFile]:
    if any((path / marker).exists() for marker in _SAVED):
        return [_saved_dataset(path, split)]
    files = sorted(file for file in path.rglob("*") if _is_data(file, path))
    if split is not None:
        files = [file for file in files if _is_of(file.relative_to(path), split)]
    if beside := [file for file in files if file.parent == path]:
        _notice_left_out(path, [file for file in files if file.parent != path])
        files = beside
    if split is None and len(files) > 1:
        _check_one_split(path, files)
    kinds = sorted({kind for file in files if (kind := kind_of(file))})
    if len(kinds) > 1:
        raise UserError(
            f"{path}: holds files of several kinds ({', '.join(kinds)}); give a glob, '{path}/*.{kinds[0]}'"
        )
    if not files:
        wanted = "data file" if split is None else f"data file with the word '{split}' in its or its folder's name"
        raise UserError(
            f"{path}: not a directory saved by datasets' save_to_disk, and no {wanted} in it ({', '.join(SUFFIXES)})"
        )
    return [_data_file(file) for file in files]


def _splits(file: Path) -> set[str]:
    """The splits that a file's path names."""
    return set(_SPLITS.findall(str(file.with_name(file.name.partition(".")[0])).lower()))


def _is_of(file: Path, split: str) -> bool:
    """Whether a file's path has the split's name as a word."""
    word = rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])"
    return split in _splits(file) or re.search(word, str(file)) is not None


def _check_one_split(path: Path, files: list[Path]) -> None:
    """Refuse files of which some are not to be trained on, perhaps."""
    named = {file: _splits(file.relative_to(path)) for file in files}
    splits = sorted(set().union(*named.values()))
    if len(splits) > 1:
        raise UserError(
            f"{path}: holds the splits {', '.join(splits)}; name one, '{path}:{splits[-1]}', or give a glob"
        )
    others = [file for file in files if not named[file]]
    if splits and others:
        raise UserError(
            f"{path}: holds the split {splits[0]}, and {others[0].relative_to(path)}, which names none; "
            f"name the split, '{path}:{splits[0]}', or give a glob, '{path}/*{others[0].suffix}'"
        )


def _notice_left_out(path: Path, files: list[Path]) -> None:
    if files and path not in _noticed:
        _noticed.add(path)
        logger.warning(
            "%s: its own files are read, not the %d in folders of it (first: %s); a glob with ** reads all",
            path, len(files), files[0].relative_to(path),
        )  # fmt: skip


def _is_data(path: Path, root: Path) -> bool:
    described = ("dataset_info.json", "dataset_infos.json")
    hidden = any(part[0] == "." for part in path.relative_to(root).parts)
    return path.is_file() and kind_of(path) is not None and not hidden and path.name not in described


def _saved_dataset(path: Path, split: str | None) -> DataFile:
    import datasets  # late: it takes a second, which files of text do without

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what damaged JSON leads to
        raise UserError(f"{path}: can't be read as a saved data set: {type(error).__name__}: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise UserError(
                f"{path}: has no split '{wanted}', only {', '.join(loaded)}; name one, "
                f"'{path}:{next(iter(loaded), 'train')}'"
            )
        return DataFile(f"{path}:{split}" if split else str(path), "dataset", loaded[wanted])
    if split is not None:
        raise UserError(f"{path}:{split}: this data set has no splits; name it without ':{split}'")
    return DataFile(str(path), "dataset", loaded)


def _hub_dataset(name: str, id: str, config: str | None, revision: str | None, split: str | None) -> DataFile:
    import datasets  # late: it takes a second, which files of text do without

    given = {"name": config, "revision": revision}
    try:
        loaded = datasets.load_dataset(
            id, split=split or "train", **{key: value for key, value in given.items() if value is not None}
        )
    except Exception as error:  # the hub's client raises errors of many families
        raise UserError(
            f"{name}: no such file or directory (looked from {Path.cwd()}), and as a hub data set with a "
            f"split '{split or 'train'}' it can't be loaded: {error}"
        ) from None
    return DataFile(name, "dataset", loaded)
