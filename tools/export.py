"""export.py: a checkpoint of a run as a model directory.

    python -m tools.export RUN_DIR/checkpoints/step-00000040 FOLDER

The folder is a normal Hugging Face directory, as RUN_DIR/final is after the last step: evaluate.py,
train.py and other programs load it. With LoRA the adapter is added to the model that the run began
with, and stands in FOLDER/adapter, too.
"""

import argparse
from pathlib import Path

import torch

import evaluate
import run_folder
import toy
from config import load_run_config
from model import load_policy
from tools.command import command


def export(checkpoint: Path, target: Path) -> None:
    """Write the policy of a checkpoint to `target`. Raises ValueError or OSError."""
    if target.exists():
        raise ValueError(f"{target} exists; expected the name of a new folder")
    run_folder.check_checkpoint(checkpoint)
    # The run's folder holds its resolved config, and with it the model that it began with.
    config = load_run_config(checkpoint.parent.parent / "config.yaml")
    path = config.model.path
    if path == "toy":
        path = toy.warm_start_folder(config)
    facts = run_folder.read_facts(checkpoint)
    if config.lora.rank and evaluate.weights_of(str(path)) != facts["inputs"]["model.path"]:
        raise ValueError(
            f"model.path: what is there is not what {checkpoint} was made with; restore {path}"
        )
    policy = load_policy(path, torch.device("cpu"), trainable=True)
    # With LoRA a checkpoint holds the adapter alone.
    saved = run_folder.read_tensors(checkpoint)["policy"]
    weights = dict(policy.hf.named_parameters()) | saved

    def fill(folder: Path) -> None:
        run_folder.save_final(policy, folder, weights, config=config)

    run_folder.write_folder(target, fill)


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
