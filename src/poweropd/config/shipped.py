"""Finds the recipes that come with poweropd: in a wheel, or in `recipes/` of a checkout."""

import logging
from importlib.resources import files
from pathlib import Path

logger = logging.getLogger("poweropd")

FOLDER = "recipes"


def shipped_recipe(name: str) -> Path:
    """Returns the path of a recipe that comes with poweropd.

    A wheel holds them in the package; in a checkout, they are beside `src`.
    """
    package = Path(str(files("poweropd")))
    installed = package / FOLDER / name
    return installed if installed.exists() else package.parents[1] / FOLDER / name


def find_recipe(path: Path) -> Path:
    """Returns the path itself or, if nothing is there, the recipe recipes/NAME of poweropd.

    So the commands of the documentation work in any directory.
    """
    try:
        missing = path.parts[:1] == (FOLDER,) and not path.exists()
    except ValueError:  # a NUL in it
        return path
    shipped = shipped_recipe(str(Path(*path.parts[1:]))) if missing else path
    if not missing or not shipped.is_file():
        return path
    logger.info("%s is not here: the recipe of that name that comes with poweropd is taken", path)
    return shipped
