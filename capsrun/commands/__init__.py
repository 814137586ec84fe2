"""The commands, a file each: `main(config, overrides)`."""

import capsrun.report  # noqa: F401  before anything imports matplotlib
