"""lora.py: adapters of low rank beside frozen weights (LoRA, arXiv 2106.09685).

A linear layer of the decoder, with weights W, gets two small matrices of rank r beside it:

    y = W·x + (α / r)·B·A·x

W is frozen; only A and B are trained. B is zero at first, so training begins with the model as it
came. What makes full fine-tuning large is 16 bytes for each trained weight: itself, its gradient
and AdamW's two moments, all in float32. Here only A and B have these, less than 1 % of the weights,
and W stays in 16 bits. The base is there all the time: with its adapter `off`, the policy is its
own reference policy, which takes no memory.

While it is trained, the adapter is never added to W. A number of 16 bits has 8 significant ones,
so adding less than 1/512 of a weight leaves it as it was, and most of what RL learns is smaller. So
rollouts and evaluations decode with the adapter beside W, too: what is sampled is what is scored.
Only `final/` holds sums (`merged`).

Shapes: r rank; in and out, the widths of a linear layer.
"""

import contextlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The linear layers that a decoder layer has: of its attention, and of its MLP.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: lora_A [r, in] and lora_B [out, r], both float32.

    It is the layer that it was, with another class and two more parameters (`add`). So the names of
    its own weights stay, and with them everything that loads, saves or shards them.
    """

    scale: float  # α / r
    is_on: bool

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        output = super().forward(x)
        if not self.is_on:
            return output
        # From left to right, so that no [out, in] matrix arises.
        return output + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)


def add(policy: nn.Module, settings, seed: int) -> None:
    """Freeze a policy, and put adapters beside the linear layers of its decoder.

    settings: has rank, alpha and targets, as the section `lora` of the config. The seed decides
    what A begins with: the same on all processes.
    """
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in policy.hf.model.language_model.layers:
        for name, linear in layer.named_modules():
            if name.rpartition(".")[2] in settings.targets:
                _adapt(linear, settings, generator)


def _adapt(linear: nn.Linear, settings, generator: torch.Generator) -> None:
    down = torch.empty(settings.rank, linear.in_features)
    # As a linear layer of PyTorch begins: uniform within ±1 / √in.
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up = torch.zeros(linear.out_features, settings.rank)
    linear.__class__ = LoRALinear
    linear.scale = settings.alpha / settings.rank
    linear.is_on = True
    linear.lora_A = nn.Parameter(down.to(linear.weight.device))
    linear.lora_B = nn.Parameter(up.to(linear.weight.device))


@contextlib.contextmanager
def off(policy: nn.Module):
    """Inside, a policy computes what its base does. One without adapters stays what it is."""
    adapted = [module for module in policy.modules() if isinstance(module, LoRALinear)]
    for linear in adapted:
        linear.is_on = False
    try:
        yield
    finally:
        for linear in adapted:
            linear.is_on = True


# --------------------------------------------------------------------------------- what is written


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def state(policy: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds, by name: the adapter alone; without one, all weights."""
    weights = dict(policy.hf.named_parameters())
    adapter = {name: weight for name, weight in weights.items() if is_of_adapter(name)}
    return adapter or weights


def merged(weights: dict[str, Tensor], settings) -> dict[str, Tensor]:
    """The weights of a model without an adapter, W + (α / r)·B·A where there is one, in float32.

    weights: of the base and of the adapter, by name, whole and on one device.
    """
    scale = settings.alpha / settings.rank
    sums = {}
    for name, weight in weights.items():
        if is_of_adapter(name):
            continue
        sums[name] = weight.detach().float()
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in weights:
            down, up = weights[f"{layer}.lora_A"], weights[f"{layer}.lora_B"]
            sums[name] = torch.addmm(sums[name], up.detach(), down.detach(), alpha=scale)
    return sums


def save_adapter(folder: Path, weights: dict[str, Tensor], settings, base: str) -> None:
    """Write the adapter as PEFT does: PeftModel.from_pretrained(model, folder) puts it beside W.

    weights: as for `merged`. base: the name or path of the model that it belongs to.
    """
    from safetensors.torch import save_file

    targets = "|".join(name for name in TARGETS if name in settings.targets)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # An expression, since the vision tower has layers of the same names.
        "target_modules": rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({targets})",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.weight": weight.detach().contiguous()
        for name, weight in weights.items()
        if is_of_adapter(name)
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
