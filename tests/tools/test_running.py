"""evaluate.py run: small files of each benchmark, answered by a tiny model."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from benchmark_rows import write_tsv
from benchmark_runs import FILES, QUICK, A, lines, run_benchmark, save_tiny_policy
from conftest import picture
from safetensors.torch import load_file, save_file

import evaluate
import rewards
import run_folder
import toy
from benchmarks import BenchmarkError, find, running
from benchmarks.visual import MME
from config import load_config
from data import Sample
from distributed import SharedError, World, on_main, together
from model import load_policy
from rollout import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer, image_processor):
    """The folder of a tiny random policy."""
    return save_tiny_policy(tmp_path_factory.mktemp("model"), tokenizer, image_processor)


@pytest.fixture
def run(model, tmp_path):
    """run(name, *options, rows=…, out=…) runs the command in this process, returns the folder."""
    return functools.partial(run_benchmark, model, tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """The places of each batch that is generated."""
    batches, plain = [], evaluate.respond

    def spy(policy, samples, places, template, **options):
        batches.append(list(places))
        return plain(policy, samples, places, template, **options)

    monkeypatch.setattr(evaluate, "respond", spy)
    return batches


@pytest.mark.parametrize("name", FILES)
def test_run_and_score_each_benchmark(run, tmp_path, capsys, name):
    folder = run(name)
    found = lines(folder)
    assert [row["index"] for row in found] == [
        str(row["index"]) for row in FILES[name] if row["image"]
    ]
    assert all(
        list(row) == ["index", "response"] and isinstance(row["response"], str) for row in found
    )
    printed = capsys.readouterr()
    assert f"{folder / 'responses.jsonl'}: {len(found)} responses" in printed.out
    assert "the released" in printed.err
    for mode in ("raw", "final"):
        files = ["--data", tmp_path / f"{name}.tsv", "--responses", folder / "responses.jsonl"]
        evaluate.main(["score", "--benchmark", name, *map(str, files), "--mode", mode])
        printed = capsys.readouterr()
        score = json.loads(printed.out)
        assert list(score) == ["benchmark", "mode", "headline", "scores", "counts", "judge"]
        assert score["benchmark"] == name
        assert score["mode"] == mode
        assert score["counts"]["scored"] == len(found)


def test_responses_are_those_to_each_row_alone(run, model):
    """The pictures first, in order, then the dataset's prompt in one user turn.

    What a batch holds changes no response.
    """
    folder = run("MMBench_DEV_EN_V11")
    policy = load_policy(model, torch.device("cpu"), trainable=False)
    a, b = picture(56, 56, 0), picture(84, 140, 1)
    asked = (("What?", (a,)), ("Are they the same?", (a, b)), ("What?", (a,)), ("Sum?", (b,)))
    for row, (question, images) in zip(lines(folder), asked, strict=True):
        text = (
            f"Question: {question}\nOptions:\nA. red\nB. blue\n"
            "Please select the correct answer from the options above. \n"
        )
        sample = Sample("", images, "<image>" * len(images) + text, "")
        prompt = policy.encode(sample, 0, "{question}")
        rollout = generate(policy, [prompt], group_size=1, max_new_tokens=4, key=None)
        tokens = rollout.tokens[0].tolist()
        assert row["response"] == policy.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_training_prompt_and_image_sizes_reach_the_model(run, monkeypatch, capsys):
    """Without options, an image has at least 1280 tokens' worth of pixels, as in VLMEvalKit."""
    calls = []

    def spy(policy, samples, places, template, **_):
        calls.append((template, dict(policy.image_processor.size)))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "respond", spy)
    for options, out in (
        ((), "a"),
        (("--prompt", "train", "--min-pixels", "4000", "--max-pixels", "5000"), "b"),
        (("--prompt", "train", "--template", "{question} Go."), "c"),
    ):
        with pytest.raises(SystemExit) as leaving:
            run("LogicVista", *options, out=out)
        assert leaving.value.code == 130
        assert capsys.readouterr().err.splitlines()[-1] == "stopped; the same command goes on"
    assert [template for template, _ in calls] == [
        "{question}",
        load_config().data.prompt_template,
        "{question} Go.",
    ]
    assert [(size["shortest_edge"], size["longest_edge"]) for _, size in calls] == [
        (3136, 12845056),
        (4000, 5000),
        (3136, 12845056),
    ]
    assert (
        MME.min_pixels,
        MME.max_pixels,
        MME.max_new_tokens,
    ) == (1003520, 12845056, 2048)


def test_batches_are_of_like_length_and_within_the_budget(run, asked, monkeypatch):
    """Prompt and response tokens of a batch stay within --max-cache-tokens.

    The longest prompts come first.
    """
    rows = [
        dict(FILES["LogicVista"][0], index=i, question="Sum circle. " * (1 + 7 * i % 5))
        for i in range(10)
    ]
    lengths = {}
    plain = running.measure

    def spy(*arguments, **options):
        lengths.update(plain(*arguments, **options))
        return lengths

    monkeypatch.setattr(running, "measure", spy)
    run("LogicVista", "--max-cache-tokens", "200", rows=rows)
    in_order = [lengths[place] for batch in asked for place in batch]
    assert sorted(sum(asked, [])) == list(range(10))
    assert in_order == sorted(in_order, reverse=True)
    assert len(set(in_order)) == 5
    assert all(sum(lengths[place] + 4 for place in batch) <= 200 for batch in asked)
    assert 2 < len(asked) < 10


def test_a_second_run_does_only_what_is_missing(run, asked, capsys):
    """Also after a line was cut in half; a finished run generates nothing."""
    folder = run("MMBench_DEV_EN_V11")
    whole = (folder / "responses.jsonl").read_bytes()
    parts = whole.splitlines(keepends=True)
    (folder / "responses.jsonl").write_bytes(parts[0] + parts[2] + parts[1][:-9])
    asked.clear()
    run("MMBench_DEV_EN_V11")
    assert sorted(sum(asked, [])) == [1, 3]
    assert (folder / "responses.jsonl").read_bytes() == whole
    asked.clear()
    capsys.readouterr()
    run("MMBench_DEV_EN_V11")
    assert not asked
    assert (folder / "responses.jsonl").read_bytes() == whole
    assert "final: circular accuracy" in capsys.readouterr().out


def test_what_was_generated_before_a_crash_is_kept(run, monkeypatch):
    plain = evaluate.respond
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return plain(*arguments, **options)

    monkeypatch.setattr(evaluate, "respond", failing)
    with pytest.raises(RuntimeError):
        run("MMBench_DEV_EN_V11", "--max-cache-tokens", "1")
    folder = run("MMBench_DEV_EN_V11", "--max-cache-tokens", "1")
    assert len(calls) == 3 + 2
    assert [row["index"] for row in lines(folder)] == [
        "3",
        "4",
        "1000003",
        "5",
    ]


def test_files_of_other_processes_are_merged_first(run, asked):
    """Left behind by a run on more processes.

    Whole lines count, a response that is there already is not doubled.
    """
    folder = run("MMBench_DEV_EN_V11")
    parts = (folder / "responses.jsonl").read_text().splitlines(keepends=True)
    (folder / "responses.jsonl").write_text(parts[0])
    (folder / "responses.rank3.jsonl").write_text(parts[0] + parts[2] + parts[3][:5])
    asked.clear()
    run("MMBench_DEV_EN_V11")
    assert sorted(sum(asked, [])) == [1, 3]
    assert (folder / "responses.jsonl").read_text() == "".join(parts)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "responses.jsonl",
        "run.json",
    ]


def test_a_folder_holds_one_run(run, model, tmp_path, asked):
    folder = run("LogicVista")
    before = (folder / "responses.jsonl").read_bytes()
    asked.clear()
    with (
        run_folder.exclusive(folder, "--out"),
        pytest.raises(SystemExit, match="another process is writing there; set --out"),
    ):
        run("LogicVista")
    for name, options, message in (
        ("MME", (), "another benchmark .'LogicVista', now 'MME'.*set --out to a new folder"),
        ("LogicVista", ("--prompt", "train"), "another prompt .'benchmark', now 'train'"),
        ("LogicVista", ("--temperature", "0.5"), "another temperature .0.0, now 0.5"),
        ("LogicVista", ("--max-new-tokens", "5"), "another max_new_tokens .4, now 5"),
        ("LogicVista", ("--dtype", "bfloat16"), "another dtype .'float32', now 'bfloat16'"),
    ):
        with pytest.raises(SystemExit, match=f"error: {folder} holds a run with {message}"):
            run(name, *options)
    with pytest.raises(SystemExit, match="another data .*LogicVista.tsv' has another content now"):
        run("LogicVista", rows=[dict(FILES["LogicVista"][0], answer="B")])
    other = tmp_path / "other"
    shutil.copytree(model, other)
    run("LogicVista", "--model", str(other))  # a copy is the same model
    weights = load_file(other / "model.safetensors")
    weights[max(weights)] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="another model"):
        run("LogicVista", "--model", str(other))
    assert not asked
    assert (folder / "responses.jsonl").read_bytes() == before
    (folder / "run.json").unlink()
    with pytest.raises(SystemExit, match="holds responses but no run.json"):
        run("LogicVista")
    (folder / "run.json").write_text("{")
    with pytest.raises(SystemExit, match="run.json cannot be read"):
        run("LogicVista")


def test_a_folder_of_an_earlier_version_goes_on_and_knows_no_more_than_before(run, tmp_path, asked):
    picture(84, 56, 0).save(tmp_path / "a.png")
    row = {"index": 1, "question": "?", "answer": "B", "skill": "spatial", "image_path": "a.png"}
    folder = run("LogicVista", rows=[row])
    path = folder / "run.json"
    settings = json.loads(path.read_text())
    assert settings["image_root"] == str(tmp_path.resolve())  # its pictures are paths
    for key in ("image_root", "dtype"):
        del settings[key]
    path.write_text(json.dumps(settings))
    asked.clear()
    run("LogicVista", "--dtype", "bfloat16", rows=[row])
    assert not asked
    assert json.loads(path.read_text()) == settings


def test_pictures_of_another_folder_are_another_run(run, tmp_path):
    row = {"index": 1, "question": "?", "answer": "B", "skill": "spatial", "image_path": "a.png"}
    for folder, seed in ((tmp_path, 0), (tmp_path / "more", 1)):
        folder.mkdir(exist_ok=True)
        picture(84, 56, seed).save(folder / "a.png")
    run("LogicVista", rows=[row])
    with pytest.raises(SystemExit, match="another image_root .*more'"):
        run("LogicVista", "--image-root", str(tmp_path / "more"), rows=[row])


def test_all_bad_rows_are_one_error_before_anything_is_generated(run, asked):
    good = FILES["LogicVista"][0]
    rows = [
        good,
        dict(good, index=2, image="A" * 81),
        dict(good, index=3, image="2"),
        dict(good, index=4, question="<|im_end|>"),
        dict(good, index=5, question="<image> ?"),
        dict(good, index=6, question=""),
    ]
    with pytest.raises(SystemExit) as error:
        run("LogicVista", rows=rows)
    text = str(error.value)
    assert text.startswith("error: 5 of 6 rows cannot be used:\n")
    assert not asked
    with pytest.raises(SystemExit, match="line 2: 'category' is 'colour'; expected one of"):
        run("MME", rows=[dict(FILES["MME"][0], category="colour")])
    with pytest.raises(SystemExit, match="line 3: 'choices' is 'A, B', which cannot be read"):
        run(
            "MathVision_MINI",
            rows=[FILES["MathVision_MINI"][0], dict(FILES["MathVision_MINI"][1], choices="A, B")],
        )
    assert not asked
    for line, message in (
        (3, "image 1 of 1 is 'AAA"),
        (4, "image 1 of 1 is 'AAA"),
        (5, "the question contains <|im_end|>"),
        (6, "found 1 images, 2 <image> markers"),
        (7, "'question' is empty"),
    ):
        assert f"LogicVista.tsv, line {line}: {message}" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (("--benchmark", "MMEE"), "no benchmark 'MMEE'; did you mean 'MME'"),
        (("--sample", "2"), "--sample 2: greedy responses are all the same"),
        (("--sample", "0"), "expected 1 or more"),
        (("--temperature", "-1"), "--temperature: expected 0"),
        (("--max-pixels", "5"), "--min-pixels and --max-pixels"),
        (("--model", "/nowhere"), "model.path: '/nowhere' is no folder"),
        (("--out", "/proc/x"), "/proc/x"),
        (("--data", "/nowhere.tsv"), "/nowhere.tsv cannot be read"),
        (("--prompt", "train", "--template", "no place"), "has 0 {question}; expected exactly one"),
        (("--template", "{question}"), "that of --prompt train; found it with --prompt benchmark"),
    ],
)
def test_wrong_arguments_are_one_error(run, options, message):
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        run("LogicVista", *options)


def test_samples_for_pass_at_k(run, tmp_path, capsys):
    """Streams depend on seed, row and sample.

    Neither batches nor an interruption between the samples of a row change them.
    """
    options = ("--sample", "3", "--temperature", "1.5")
    folder = run("MMBench_DEV_EN_V11", *options)
    pairs = [(row["index"], row["sample"]) for row in lines(folder)]
    assert pairs == [(index, i) for index in ("3", "4", "1000003", "5") for i in range(3)]
    assert len({row["response"] for row in lines(folder)}) > 6
    whole = (folder / "responses.jsonl").read_bytes()
    (folder / "responses.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    run("MMBench_DEV_EN_V11", *options, "--max-cache-tokens", "1")
    assert (folder / "responses.jsonl").read_bytes() == whole
    capsys.readouterr()
    name = "MMBench_DEV_EN_V11"
    files = ["--data", tmp_path / f"{name}.tsv", "--responses", folder / "responses.jsonl"]
    evaluate.main(["score", "--benchmark", name, *map(str, files)])
    found = json.loads(capsys.readouterr().out)
    assert {"pass@1", "pass@2", "pass@3"} <= found["scores"].keys()
    assert found["counts"]["scored"] == 12
    other = run("MMBench_DEV_EN_V11", *options, "--seed", "1", out="other")
    assert (other / "responses.jsonl").read_bytes() != whole


def test_two_processes_write_what_one_does(run, model, tmp_path):
    """Rows are split over ranks, nothing is done twice, and one file comes out."""
    rows = [
        dict(FILES["LogicVista"][0], index=i, question="Sum " + "circle, " * (i % 3))
        for i in range(7)
    ]
    one = run("LogicVista", rows=rows)
    two = tmp_path / "two"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    files = ["--model", model, "--data", tmp_path / "LogicVista.tsv", "--out", two]
    command = [evaluate.__file__, "run", "--benchmark", "LogicVista", *map(str, files), *QUICK]
    done = subprocess.run(
        [sys.executable, *torchrun, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    responses = (two / "responses.jsonl").read_bytes()
    assert responses == (one / "responses.jsonl").read_bytes()
    assert sorted(path.name for path in two.iterdir()) == [
        ".lock",
        "responses.jsonl",
        "run.json",
    ]
    assert done.stdout.count("7 responses") == 1
    assert done.stderr.count("the released LogicVista has") == 1


def test_an_error_on_one_process_ends_all():
    class Two(World):
        def gather(self, value):
            return [value, "second is ill"] if self.rank == 0 else [None, value]

    with pytest.raises(SharedError, match="second is ill"):
        together(Two(0, 2, torch.device("cpu")), lambda: 1)
    with pytest.raises(SharedError, match="invalid literal"):
        together(Two(1, 2, torch.device("cpu")), lambda: int("ill"))
    alone = World(0, 1, torch.device("cpu"))
    assert together(alone, lambda: 1) == on_main(alone, lambda: 1) == 1


@pytest.mark.filterwarnings("ignore:.*the released")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_row_of_any_process_ends_all(tmp_path, make_policy, rank):
    path = write_tsv(
        tmp_path / "x.tsv",
        [dict(FILES["LogicVista"][0], index=i, image=(A, "A" * 81)[i]) for i in range(2)],
    )
    rows, _ = find("LogicVista").load(path, pictures=True)

    class Both(World):
        def gather(self, value):
            return [({0: 9}, {}), value] if self.rank else [value, ({}, {1: "line 3: bad"})]

    with pytest.raises(BenchmarkError) as error:
        running.measure(
            make_policy(),
            find("LogicVista"),
            rows,
            todo=[0, 1],
            template="{question}",
            root=tmp_path,
            world=Both(rank, 2, torch.device("cpu")),
        )
    summary, problem = str(error.value).splitlines()
    assert summary == "1 of 2 rows cannot be used:"
    # The stand-in for the second process found the bad row when this is the first one.
    assert problem == "  line 3: bad" if rank == 0 else "x.tsv, line 3: image 1 of 1" in problem


def test_the_toy_is_run_by_the_same_command_and_answers_as_in_training(
    model, tmp_path, monkeypatch, capsys
):
    """The greedy responses are those that train.py's evaluation scores."""
    monkeypatch.setattr(toy, "prepare", lambda *_, **__: model)
    command = ["run", "--model", "toy", "--benchmark", "toy", "--out", str(tmp_path / "toy")]
    evaluate.main([*command, "--max-new-tokens", "6"])
    assert "final: accuracy 0.0" in capsys.readouterr().out
    policy = load_policy(model, torch.device("cpu"), trainable=False)
    texts = []
    monkeypatch.setattr(rewards, "accuracy", lambda text, answer: texts.append(text) or 0.0)
    evaluate.held_out(
        policy,
        [toy.make_sample(toy.LEVELS[1], 0, "test", i) for i in range(5)],
        load_config().data.prompt_template,
        max_new_tokens=6,
        seed=0,
        swapped=False,
    )

    def plain(text):
        return policy.tokenizer.decode(policy.tokenizer(text).input_ids, skip_special_tokens=True)

    found = lines(tmp_path / "toy")
    assert len(found) == 200
    assert [row["response"] for row in found[:5]] == [plain(text) for text in texts[5:]]
