"""bench.py: what the packed group forward saves, as ratios measured side by side in one run.

    python bench.py update        # packed groups against G padded rows, forward and backward

Rounds are interleaved, medians are printed with the smallest and the largest; nothing else should run meanwhile.
"""
import os
import statistics
import sys
import time

import torch
from PIL import Image

import toy
from config import load_config
from data import Sample, encode_prompt
from model import ATTENTION, Policy, TokenLogprobs

GROUP, NEW_TOKENS, ROUNDS = 8, 64, 7
SIZES = {100: (280, 280), 600: (700, 672)}  # visual tokens -> pixels


def padded_logprobs(policy: Policy, prompt, tokens: torch.Tensor) -> torch.Tensor:
    """The usual way: the stock forward on G rows [prompt | response], the image encoded once per row."""
    rows, hf = len(tokens), policy.hf
    hf.model.rope_deltas = None
    ids = torch.cat([prompt.input_ids.expand(rows, -1), tokens], dim=1)
    image = torch.cat([prompt.visual_mask.expand(rows, -1), torch.zeros_like(tokens, dtype=torch.bool)], dim=1)
    hidden = hf.model(input_ids=ids, mm_token_type_ids=image.int(), attention_mask=torch.ones_like(ids), use_cache=False,
                      pixel_values=prompt.pixel_values.repeat(rows, 1), image_grid_thw=prompt.image_grid_thw.repeat(rows, 1))[0]
    hidden = hidden[:, len(prompt.input_ids) - 1:-1].reshape(tokens.numel(), -1)
    return TokenLogprobs.apply(hidden, hf.lm_head.weight, tokens.flatten(), policy.temperature, policy.suppressed, policy.CHUNK,
                               policy.forward_chunk, policy.backward_chunk)[0].view(tokens.shape)


def update() -> None:
    """Forward and backward of one group, packed and padded: same model, same numbers, same gradients."""
    template = load_config().data.prompt_template
    tokenizer, processor = toy.build_tokenizer(toy.LEVELS[1], template), toy.build_image_processor()
    policy = Policy(toy.build_model(tokenizer), tokenizer, processor)
    text_config = policy.hf.config.text_config
    for visual, size in SIZES.items():
        noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
        sample = Sample("bench", (Image.fromarray(noise.numpy()),), "<image>Sum circle, cross, square.", "")
        prompt = encode_prompt(sample, 0, tokenizer, processor, template)
        assert int(prompt.visual_mask.sum()) == visual
        tokens = torch.randint(0, 300, (GROUP, NEW_TOKENS))
        mask = torch.ones_like(tokens, dtype=torch.bool)

        def run(way: str) -> tuple[float, torch.Tensor]:
            policy.zero_grad()
            text_config._attn_implementation = ATTENTION if way == "packed" else "sdpa"
            started = time.perf_counter()
            logprobs = policy([prompt], tokens, mask).logprobs if way == "packed" else padded_logprobs(policy, prompt, tokens)
            logprobs.sum().backward()
            return time.perf_counter() - started, logprobs.detach()

        difference = (run("packed")[1] - run("padded")[1]).abs().max()
        seconds = {"packed": [], "padded": []}
        for _ in range(ROUNDS):
            for way in seconds:
                seconds[way].append(run(way)[0])
        ratios = [slow / fast for slow, fast in zip(seconds["padded"], seconds["packed"])]
        length, total = len(prompt.input_ids), GROUP * NEW_TOKENS
        print(f"{visual} visual tokens, G = {GROUP}, {NEW_TOKENS} new tokens: packed {statistics.median(seconds['packed']):.3f} s, "
              f"padded {statistics.median(seconds['padded']):.3f} s, ratio {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} … {max(ratios):.2f}); linear layers alone would give "
              f"{(GROUP * length + total) / (length + total):.2f}; log-probabilities differ by {difference:.1e}")


if __name__ == "__main__":
    if sys.argv[1:] != ["update"]:
        sys.exit(__doc__)
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    update()
