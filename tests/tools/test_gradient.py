"""gradient.py: gradients and angles by autograd, what oracles know, the command."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from observations import DYCO, SCENE, prepare
from torch.nn.functional import cosine_similarity

import dyco
import train
from config import DEFAULTS, load_config
from dyco import Signals
from rollout import Rollout, generate
from tools import gradient, gradients
from tools.gradients import HOST, Weighting
from tools.observed import AnalysisError
from tools.toy_decisions import toy_decisions


def sampled_batch(policy, prompts, step: int, rewards=None) -> train.Batch:
    """Three responses to each prompt, with random rewards if none are given."""
    rollout = generate(policy, prompts, 3, 8, (0, step), DYCO)
    if rewards is None:
        generator = torch.Generator().manual_seed(step)
        rewards = torch.rand(len(prompts), 3, generator=generator)
    return train.Batch(
        rollout,
        rewards=rewards,
        accuracy=rewards,
        format=rewards,
        old_logprobs=rollout.logprobs,
        loss_mask=rollout.mask,
    )


def slow_gradient(policy, batch: train.Batch, rule: str) -> torch.Tensor:
    """Of −mean over responses of the mean over tokens of (1 + α·w)·Â·log π, one at a time."""
    rollout = batch.rollout
    signals = rollout.signals
    centred = batch.rewards - batch.rewards.mean(1, keepdim=True)
    advantages = (centred / (batch.rewards.std(1, keepdim=True) + 1e-6)).flatten()
    token_advantages = advantages[:, None].expand(rollout.mask.shape)
    if rule == "paper":
        roles = dyco.assign_roles(signals.visual_shift, signals.text_shift, rollout.mask, 0.05)
        scores = dyco.alignment_scores(signals.visual_mass, signals.text_mass, roles, rollout.mask)
        weights = dyco.token_weights(scores, rollout.mask)
        token_advantages = (1 + 0.2 * weights) * token_advantages
    policy.zero_grad()
    for i in range(len(advantages)):
        prompt = rollout.prompts[i // 3]
        mask = rollout.mask[i]
        output = policy([prompt], rollout.tokens[i : i + 1], mask[None])
        total = (token_advantages[i] * output.logprobs[0] * mask).sum()
        (-total / mask.sum() / len(advantages)).backward()
    gradients = [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
    return torch.cat(gradients).double()


def test_gradients_and_angles_by_autograd(make_policy, prompts):
    """Against slow gradients, and acos of the cosine."""
    policy = make_policy()
    settings = ["algo.kl=0", "optim.grad_clip=1e9", "rollout.group_size=3"]
    config = load_config(DEFAULTS, settings)
    batches = [
        sampled_batch(policy, prompts, 0),
        sampled_batch(policy, prompts[:2], 1),
        sampled_batch(policy, prompts[1:], 2),
        sampled_batch(policy, prompts[:1], 3, rewards=torch.ones(1, 3)),  # has nothing to say
        sampled_batch(policy, prompts, 4),
    ]
    reference = slow_gradient(policy, batches[0], "off") + slow_gradient(policy, batches[1], "off")
    hosts = [slow_gradient(policy, batches[i], "off") for i in (2, 4)]
    papers = [slow_gradient(policy, batches[i], "paper") for i in (2, 4)]
    policy.zero_grad()
    paper = {"paper": Weighting("paper")}
    described = gradient.describe_gradients(config, policy, batches, paper)["paper"]

    def cosine(a, b) -> float:
        return float(cosine_similarity(a, b, dim=0))

    def angle(a, b) -> float:
        return math.degrees(math.acos(cosine(a, b)))

    def mean(values):
        return pytest.approx(sum(values) / 2, rel=2e-3, abs=2e-5)

    pairs = list(zip(papers, hosts, strict=True))
    assert described["length"][0] == mean([float(p.norm() / h.norm()) for p, h in pairs])
    assert described["angle"][0] == mean([angle(p, h) for p, h in pairs])
    assert described["angle"][0] > 0.1
    assert described["reference"][0] == mean([cosine(p, reference) for p in papers])
    gains = [cosine(p, reference) - cosine(h, reference) for p, h in pairs]
    assert described["gain"][0] == mean(gains)
    summed = pytest.approx(angle(sum(papers), sum(hosts)), rel=2e-3)
    assert described["summed"] == [summed, None, None]
    assert described["factor"][0] == pytest.approx(1.2, abs=1e-4)
    assert described["spread"][0] > 0.01
    with pytest.raises(AnalysisError, match="all gradients are zero"):
        gradient.describe_gradients(config, policy, batches[2:4], paper)


@pytest.fixture
def two_responses(tokenizer, prompts):
    """(batch, the tokens that decide, the one of them that decides wrong): two equal responses
    with one wrong total, of which the first has the better reward."""
    text = "cross is blue 3, total 3. cross is blue 3, total 7."
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    wrong = len(pieces) - 1 - pieces[::-1].index("7")
    zeros = torch.zeros(2, len(ids))
    mask = torch.ones(2, len(ids)).bool()
    rollout = Rollout(
        prompts=prompts[:1],
        group_size=2,
        tokens=torch.tensor([ids, ids]),
        mask=mask,
        logprobs=zeros,
        truncated=torch.zeros(2).bool(),
        signals=Signals(zeros, zeros, zeros, zeros),
        texts=[text, text],
    )
    rewards = torch.tensor([[1.0, 0.0]])
    batch = train.Batch(rollout, rewards=rewards, accuracy=rewards, format=rewards, loss_mask=mask)
    decides = sorted(toy_decisions(pieces, SCENE))
    assert len(decides) == 6
    assert wrong in decides
    return batch, decides, wrong


def test_oracles_know_what_decides_and_whom_to_blame(two_responses, tokenizer):
    """The better response is praised for all it decides, the worse one blamed for the total."""
    batch, decides, wrong = two_responses

    def marked(blame: bool) -> list[list[int]]:
        scores = gradients.oracle_scores(batch, [SCENE], tokenizer, blame)
        return [row.nonzero().flatten().tolist() for row in scores]

    assert marked(blame=False) == [decides, decides]
    assert marked(blame=True) == [decides, [wrong]]


def test_scores_of_an_oracle_go_through_eq_7_and_8(two_responses, tokenizer, monkeypatch):
    batch, _, _ = two_responses
    blame = gradients.oracle_scores(batch, [SCENE], tokenizer, blame=True)

    def update(training, batch, groups):
        training.optimizer.gradient = batch.advantages

    monkeypatch.setattr(train, "update", update)
    config = load_config(DEFAULTS)
    policy = SimpleNamespace(parameters=list)
    oracle = Weighting("paper", scores=[blame])
    by_oracle = gradients.batch_gradient(config, policy, batch, oracle, 0)
    host = gradients.batch_gradient(config, policy, batch, HOST, 0)
    weights = dyco.token_weights(blame, batch.rollout.mask)
    torch.testing.assert_close(by_oracle, (1 + 0.2 * weights) * host)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def start(make_policy, tmp_path, monkeypatch):
    return prepare(gradient.main, make_policy(seed=1), tmp_path, monkeypatch)


def test_gradient_command(start, capsys):
    """The host is 0 degrees away from itself, exactly; `paper/uniform` only makes its gradient 1.2
    times as long."""
    settings = ["rollout.prompts_per_step=2", "algo.kl=0.5", "optim.grad_clip=0.1"]
    out = start("--rules", "paper/uniform,paper", *settings)
    written = json.loads((out / "gradient.json").read_text())
    assert written["batches"] == 3
    assert set(written["rules"]) == {"off", "paper/uniform", "paper"}

    off = written["rules"]["off"]
    assert off["angle"] == off["gain"] == off["spread"] == [0, None, None]
    assert off["length"] == [1, None, None]  # fewer than four batches have no interval
    assert off["summed"] == [0, None, None]

    uniform = written["rules"]["paper/uniform"]
    assert uniform["length"][0] == pytest.approx(1.2, abs=1e-4)
    assert uniform["angle"][0] < 0.01
    assert abs(uniform["gain"][0]) < 1e-4

    paper = written["rules"]["paper"]
    over_uniform = paper["gain"][0] - uniform["gain"][0]
    assert paper["over paper/uniform"][0] == pytest.approx(over_uniform, abs=2e-5)
    assert "over paper/shuffled" not in paper
    assert paper["summed"][0] > 0.05
    assert paper["angle"][0] > 0.05
    towards = off["reference"][0] + paper["gain"][0]
    assert paper["reference"][0] == pytest.approx(towards, abs=2e-5)
    assert "angle to host's" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--rules", "paper,papper"], "no rule papper; expected some of off, paper"),
        (
            ["--rules", "vppo/shufled"],
            "no control shufled; expected one of none, shuffled, uniform",
        ),
        (["--rules", "signed_uniform"], "signed_uniform is called signed/uniform now"),
        (
            ["rollout.prompts_per_step=4"],
            "6 samples make 1 batches of rollout.prompts_per_step=4; expected 2 or more",
        ),
    ],
)
def test_gradient_refuses(start, tmp_path, more, message):
    with pytest.raises(SystemExit) as caught:
        start(*more)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
