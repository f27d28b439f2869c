"""saving.py: a checkpoint is a folder for each saved step, with checksums."""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import Tensor

import distributed
import lora
from config import Config
from model import Policy, save_policy
from run_folder.files import RunError, remove_folder, write_folder


def save_checkpoint(folder: Path, step: int, tensors: dict, facts: dict, keep_last: int) -> None:
    """Write folder/step-N with tensors.pt and facts.json; remove all but the newest `keep_last`."""

    def fill(path: Path) -> None:
        torch.save(tensors, path / "tensors.pt")
        (path / "facts.json").write_text(json.dumps(facts))
        write_checksums(path)

    write_folder(folder / f"step-{step:08d}", fill)
    for old in checkpoints(folder)[:-keep_last]:
        remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first.

    What else is there, such as a copy of one under another name, is nobody's business.
    """
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(path for path in found if path.is_dir())


def checksum(path: Path) -> str:
    """SHA-256 of every byte of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write checksums.json, of all other files of a folder."""
    checksums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums))


def check_folder(folder: Path, *needed: str) -> None:
    """Compare the files of a folder with its checksums. Raises RunError that names the file.

    A flipped bit in an exponent is enough to destroy a policy, and nothing else would notice.
    needed: names of files that must be among them.
    """
    try:
        expected = json.loads((folder / "checksums.json").read_text())
        for name in {**dict.fromkeys(needed), **expected}:
            if checksum(folder / name) != expected[name]:
                raise RunError(f"{folder / name} is not what was saved (its checksum differs)")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not whole ({error!r})") from None


def check_checkpoint(checkpoint: Path) -> None:
    """`check_folder` of a checkpoint."""
    check_folder(checkpoint, "tensors.pt", "facts.json")


def read_facts(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "facts.json").read_text())


def read_tensors(checkpoint: Path) -> dict:
    """The tensors of a checkpoint, on the CPU. Nothing in it is executed."""
    return torch.load(checkpoint / "tensors.pt", map_location="cpu", weights_only=True, mmap=True)


@torch.no_grad()
def load_tensors(policy: Policy, optimizer, tensors: dict) -> None:
    """Continue from the whole tensors of a checkpoint, whatever number of processes wrote them."""
    parameters = lora.state(policy)
    for name, parameter in parameters.items():
        parameter.copy_(distributed.share(tensors["policy"][name], parameter))
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    states = tensors["optimizer"]["state"]
    for index, state in states.items():
        states[index] = {
            name: distributed.share(value, trained[index]) if value.dim() else value
            for name, value in state.items()
        }
    optimizer.load_state_dict(tensors["optimizer"])


def save_final(policy: Policy, folder: Path, weights: dict[str, Tensor], config: Config) -> None:
    """Write a policy as a Hugging Face directory; with LoRA merged, and the adapter in adapter/.

    weights: of the policy by name, those of its adapters among them, whole and on the CPU.
    """
    dtype = config.run.final_dtype
    if not config.lora.rank:
        save_policy(policy, folder, weights, dtype=dtype)
        return
    save_policy(policy, folder, lora.merged(weights, config.lora), dtype=dtype)
    base = policy.hf.name_or_path
    lora.save_adapter(folder / "adapter", weights, config.lora, base=base)
