"""export.py: a checkpoint of a run as a model directory.

    python -m tools.export RUN_DIR/checkpoints/step-00000040 FOLDER

The folder is a normal Hugging Face directory, as RUN_DIR/final is after the last step: evaluate.py,
train.py and other programs load it.
"""

import argparse
from pathlib import Path

import torch

import run_folder
import toy
from config import load_config
from model import load_policy, save_policy
from tools.command import command


def export(checkpoint: Path, target: Path) -> None:
    """Write the policy of a checkpoint to `target`. Raises ValueError or OSError."""
    if target.exists():
        raise ValueError(f"{target} exists; expected the name of a new folder")
    run_folder.check_checkpoint(checkpoint)
    # The run's folder holds its resolved config, and with it the model that it began with.
    config = load_config(checkpoint.parent.parent / "config.yaml")
    path = config.model.path
    if path == "toy":
        path = toy.warm_start_folder(config)
    policy = load_policy(path, torch.device("cpu"), trainable=True)
    weights = run_folder.read_tensors(checkpoint)["policy"]
    dtype = config.run.final_dtype
    run_folder.write_folder(
        target, lambda folder: save_policy(policy, folder, weights, dtype=dtype)
    )


@command(ValueError, OSError, run_folder.RunError)
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="RUN_DIR/checkpoints/step-N")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    parsed = parser.parse_args(arguments)
    export(parsed.checkpoint, parsed.folder)
    print(f"{parsed.folder} is a Hugging Face directory")


if __name__ == "__main__":
    main()
