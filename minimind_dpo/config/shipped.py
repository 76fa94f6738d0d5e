"""Files of configs/ that the package carries, found by their names from any folder."""

from __future__ import annotations

from pathlib import Path

from minimind_dpo.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
# the package's link to the repository's configs, which a wheel carries as files; a checkout on a system without links
# has the directory beside the package only
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), Path("configs"))


def shipped_names(kind: str) -> list[str]:
    """Names of the files in a folder of configs/: `accelerate`, or `dpo`, the recipes."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def find_config(flag: str, name: str, kind: str) -> Path:
    """The file that a flag's value names: a path, or the name of a file that is shipped.

    Args:
        flag: as the user wrote it.
        name: its value.
        kind: the folder of configs/.

    Raises:
        UserError: there is none; the message lists the names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    names = shipped_names(kind)
    if name in names:
        return CONFIGS / kind / f"{name}.yaml"
    if path.stem in names and path.suffix in (".yaml", ".yml"):
        raise UserError(f"{flag} {name}: no such file; the one that comes with the package is {flag} {path.stem}")
    raise UserError(f"{flag} {name}: no such file, nor a name of one that comes with the package: {', '.join(names)}")
