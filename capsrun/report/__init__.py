"""What runs found, as tables, pages and pictures."""

import importlib.util
import logging
import os
from pathlib import Path

# Pictures are the same for everyone: neither a backend, which notebooks name and is rarely there,
# nor a matplotlibrc of the user's is of any use to them, nor what matplotlib says about such files.
os.environ["MPLBACKEND"] = "agg"
logging.getLogger("matplotlib").setLevel(logging.ERROR)
_own = importlib.util.find_spec("matplotlib")
if _own is not None and _own.origin is not None:
    _settings = Path(_own.origin).with_name("mpl-data") / "matplotlibrc"
    os.environ["MATPLOTLIBRC"] = str(_settings)
    if Path("matplotlibrc").exists():  # which comes before the variable, and may be damaged
        _here = os.open(".", os.O_RDONLY)
        os.chdir(_settings.parent)
        try:
            import matplotlib  # noqa: F401
        finally:
            os.fchdir(_here)
            os.close(_here)
