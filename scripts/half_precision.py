"""Write a finished run's weights in half precision: `half_precision.py CHECKPOINT OUT`.

Half the size, for sharing; eval and perturb take it: `capsrun eval checkpoint=OUT`.
"""

import sys
from pathlib import Path

from capsrun.errors import UserError
from capsrun.runs.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint


def main(source: str, target: str) -> None:
    """Read a checkpoint file, or that of a run's folder, and write the small one."""
    checkpoint = read_checkpoint(find_checkpoint(source, "capsrun train"))
    if checkpoint["optimizer"] is not None:
        raise UserError(f"{source} is not finished: train it to its end first")
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint["model"].items()
    }
    # Where and when the run's own files are is of no use to anybody else.
    state = {key: checkpoint[key] for key in ("precision", "train_seconds")}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        Path(target),
        checkpoint["config"],
        checkpoint["step"],
        model=weights,
        optimizer=None,
        **state,
    )
    print(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
