"""examples.py: the held-out samples that the report shows token by token.

train.py calls `make_examples` at each evaluation and writes what it returns to
examples/step-*.json; tools/token_view.py makes a page of it. Heat-maps are stored as one byte a
cell, and pictures as data URIs, so that the page needs no other file.
"""

import base64
import io
import math

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

import rewards
from config import Config
from data import Prompt, Sample
from evaluate import TokenReading, read_tokens
from model import Policy
from rollout import Rollout, generate

EXAMPLES = 12  # held-out samples that are answered for the report at each evaluation
EXAMPLE_TOKENS = 512  # of a response that are kept
EXAMPLE_CELLS = 256  # of all heat-maps of a sample; of larger images several tokens share a cell
PICTURE_SIDE = 448  # pixels
PICTURE_BYTES = 60_000  # a PNG that is larger becomes a JPEG


@torch.no_grad()
def make_examples(policy: Policy, samples: list[Sample], config: Config) -> list[dict]:
    """One response to each sample with all that the token view shows, ready for JSON.

    The response is the one that evaluate.held_out draws.
    """
    prompts = [
        policy.encode(
            sample,
            place,
            config.data.prompt_template,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        for place, sample in enumerate(samples)
    ]
    responses = generate(
        policy,
        prompts,
        group_size=1,
        max_new_tokens=config.rollout.max_new_tokens,
        key=(config.train.seed, "held out"),
        max_cache_tokens=config.rollout.max_cache_tokens,
        temperature=1.0,
    )
    merge = policy.image_processor.merge_size
    examples = []
    for place, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        response = responses.select([place])
        reading = read_tokens(policy, response, config.dyco)
        grids = visual_grids(prompt, merge)
        examples.append(describe_response(sample, response, reading, grids=grids))
    return examples


def visual_grids(prompt: Prompt, merge: int) -> list[list[int]]:
    """[height, width] of each of the prompt's images, in visual tokens of merge × merge patches."""
    if prompt.image_grid_thw is None:
        return []
    return (prompt.image_grid_thw[:, 1:] // merge).tolist()


def describe_response(
    sample: Sample, response: Rollout, reading: TokenReading, grids: list[list[int]]
) -> dict:
    """One example: the sample, its response and, for each kept token, what DyCo sees in it."""
    kept = min(len(reading.tokens), EXAMPLE_TOKENS)

    def rounded(values: Tensor) -> list[float]:
        return [round(value, 4) for value in values[:kept].tolist()]

    places, heat = heat_maps(reading.images[:kept].float(), grids)
    images = [
        {"file": picture(image), **place}
        for image, place in zip(sample.images, places, strict=True)
    ]
    return {
        "id": sample.id,
        "question": sample.question,
        "answer": sample.answer,
        "correct": rewards.accuracy(response.texts[0], sample.answer) == 1,
        "length": len(reading.tokens),
        "truncated": bool(response.truncated[0]),
        "tokens": reading.tokens[:kept],
        "roles": reading.roles[:kept].tolist(),
        "weights": rounded(reading.weights),
        "scores": rounded(reading.scores),
        "probabilities": rounded(reading.probabilities),
        **{name: rounded(values) for name, values in reading.signals._asdict().items()},
        "images": images,
        "peaks": rounded(heat.amax(1)) if places else [],
        "heat": encode_heat(heat),
    }


# ---------------------------------------------------------------------------------------- heat-maps


def heat_maps(
    attention: Tensor, grids: list[list[int]], cells: int = EXAMPLE_CELLS
) -> tuple[list[dict], Tensor]:
    """Attention over images, summed into cells.

    attention: [T, visual tokens]. grids: [height, width] of each image in visual tokens. Returns
    where each image's cells lie, as {"height", "width", "block"}, and the heat [T, cells].

    A cell sums block × block visual tokens. The block is the smallest that leaves at most `cells`
    cells in all images together, or one cell an image if there are more images than cells.
    """
    block = 1
    while count_cells(grids, block) > max(cells, len(grids)):
        block += 1
    places = []
    maps = []
    start = 0
    for height, width in grids:
        part = attention[:, start : start + height * width].view(-1, 1, height, width)
        # Zeros fill up the last row and column of cells. A divisor of 1 makes the mean a sum.
        part = F.pad(part, (0, -width % block, 0, -height % block))
        maps.append(F.avg_pool2d(part, block, divisor_override=1).flatten(1))
        places.append({"height": height, "width": width, "block": block})
        start += height * width
    if not maps:
        return places, attention[:, :0]
    return places, torch.cat(maps, dim=1)


def count_cells(grids: list[list[int]], block: int) -> int:
    """How many cells of block × block visual tokens cover all images."""
    return sum(math.ceil(height / block) * math.ceil(width / block) for height, width in grids)


def encode_heat(heat: Tensor) -> str:
    """[T, cells] -> base64 of T × cells bytes, each row's largest value 255."""
    levels = heat
    if heat.shape[1]:
        levels = 255 * heat / heat.amax(1, keepdim=True).clamp(min=1e-12)
    return base64.b64encode(levels.round().byte().numpy().tobytes()).decode()


def decode_heat(text: str, tokens: int, cells: int) -> Tensor:
    """The inverse of `encode_heat`: [tokens, cells] in 0 … 255. Raises ValueError."""
    heat = base64.b64decode(text, validate=True)
    if len(heat) != tokens * cells:
        raise ValueError(f"a heat-map has {len(heat)} cells; expected {tokens * cells}")
    if not heat:
        return torch.zeros(tokens, cells)
    return torch.frombuffer(bytearray(heat), dtype=torch.uint8).float().view(tokens, cells)


def coarsen(example: dict, cells: int) -> dict:
    """The example with at most `cells` heat-map cells. Raises ValueError."""
    grids = [
        [math.ceil(image["height"] / image["block"]), math.ceil(image["width"] / image["block"])]
        for image in example["images"]
    ]
    heat = decode_heat(example["heat"], len(example["tokens"]), count_cells(grids, 1))
    if not heat.numel():
        return example
    places, pooled = heat_maps(heat, grids, cells)
    images = [
        {**image, "block": image["block"] * place["block"]}
        for image, place in zip(example["images"], places, strict=True)
    ]
    return {**example, "images": images, "heat": encode_heat(pooled)}


def picture(image: Image) -> str:
    """A data URI of the image with at most PICTURE_SIDE pixels a side.

    It is a PNG where that is small, and a JPEG elsewhere.
    """
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    kind = "png"
    if buffer.tell() >= PICTURE_BYTES:
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
