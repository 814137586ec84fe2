"""What runs found, as tables, pages and pictures."""

import importlib.util
import logging
import os
import warnings
from pathlib import Path


def prepare_matplotlib() -> None:
    """Let pictures be the same for everyone, before anything imports matplotlib.

    Neither a backend, which notebooks name and is rarely there, nor a matplotlibrc of the user's is
    of any use to them, nor what matplotlib says about such files.
    """
    os.environ["MPLBACKEND"] = "agg"
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class may have any name
    package = importlib.util.find_spec("matplotlib")
    if package is None or package.origin is None:
        return
    settings = Path(package.origin).with_name("mpl-data") / "matplotlibrc"
    os.environ["MATPLOTLIBRC"] = str(settings)
    if Path("matplotlibrc").exists():  # which comes before the variable, and may be damaged
        here = os.open(".", os.O_RDONLY)
        os.chdir(settings.parent)
        try:
            import matplotlib  # noqa: F401
        finally:
            os.fchdir(here)
            os.close(here)


prepare_matplotlib()
