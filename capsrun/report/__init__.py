"""What runs found, as tables, pages and pictures."""

import os

# Notebooks name a backend of their own for every command, which is rarely installed here; no
# picture needs one, as all are written to files.
os.environ["MPLBACKEND"] = "agg"
