"""data.py on files built here: no download, no model, a byte-level tokenizer made in the test."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from row_files import chat_row, load_rows, noise, plain_row, write_rows
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
from data import DataError, JsonlDataset, Sample, Sampler, check_lengths, encode_prompt
from rows import QWEN_SPECIAL_TOKENS, parse_row

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


SPECIAL = list(QWEN_SPECIAL_TOKENS)
TEMPLATE = "{question}\nThink first."


def make_tokenizer(**options) -> Qwen2Tokenizer:
    vocab = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    vocab["he"] = len(vocab)  # one merge, so that it is a BPE and not a byte table
    options = {"extra_special_tokens": SPECIAL} | options
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[("h", "e")], **options)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})


# ---------------------------------------------------------------- the file as a whole


def test_fingerprint_is_of_the_content_and_of_the_rows_in_use(folder):
    first = load_rows(folder, [plain_row()])
    second = load_rows(folder, [plain_row("Other?")])
    again = load_rows(folder, [plain_row()])
    assert first.fingerprint == again.fingerprint != second.fingerprint
    rows = [plain_row(image="late.png"), plain_row()]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        before = load_rows(folder, rows, on_error="skip")
    (folder / "late.png").write_bytes((folder / "a.png").read_bytes())
    after = load_rows(folder, rows, on_error="skip")
    assert after.fingerprint != before.fingerprint  # place 0 is another row now


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [plain_row(image="a.png"), plain_row(image=str(folder / "a.png"))]
    path = write_rows(elsewhere / "rows.jsonl", rows)
    assert len(JsonlDataset(path, image_root=folder, progress=False)) == 2
    with pytest.raises(DataError, match="image_root .*not a folder"):
        JsonlDataset(path, image_root=folder / "nope", progress=False)


def test_problems_are_reported_together_twenty_and_the_total(folder):
    rows = [plain_row("") if i % 2 else plain_row(image="no.png") for i in range(25)]
    rows.append(plain_row())
    with pytest.raises(DataError) as caught:
        load_rows(folder, rows)
    message = str(caught.value)
    assert "25 of 26 rows" in message
    assert "and 5 more" in message
    listed = [n for n in range(1, 27) if f"line {n}:" in message]
    assert listed == list(range(1, 21))
    assert message.index("line 1:") < message.index("line 2:") < message.index("line 20:")


def test_skip_warns_once_and_drops(folder):
    rows = [plain_row(""), plain_row("Kept?"), plain_row(image="no.png"), "{"]
    path = write_rows(folder / "rows.jsonl", rows)
    with pytest.warns(UserWarning) as caught:
        dataset = JsonlDataset(path, on_error="skip", progress=False)
    assert [dataset[i].question for i in range(len(dataset))] == ["Kept?"]
    assert len(caught) == 1
    assert all(f"line {n}:" in str(caught[0].message) for n in (1, 3, 4))
    assert Path(caught[0].filename).name == "test_data.py"  # the warning points at the caller


def test_nothing_left_is_an_error(folder):
    with pytest.raises(DataError, match="1 of 1 rows"):
        load_rows(folder, [plain_row("")], on_error="skip")
    for content in ([], ["", "  "]):
        with pytest.raises(DataError, match="is empty"):
            load_rows(folder, content, on_error="skip")
    with pytest.raises(DataError, match='expected "raise" or "skip"'):
        load_rows(folder, [plain_row()], on_error="ignore")


def test_file_that_cannot_be_read(folder):
    write_rows(folder / "train.jsonl", [plain_row()])
    with pytest.raises(DataError, match=r"trian\.jsonl.*near names in its folder: train\.jsonl"):
        JsonlDataset(folder / "trian.jsonl")
    with pytest.raises(DataError, match="its folder cannot be read either"):
        JsonlDataset(folder / "no" / "train.jsonl")
    for path in (folder, folder / "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            JsonlDataset(path)


def test_wrong_image_root_is_suspected_only_if_every_first_image_misses(folder):
    rows = [plain_row(), *[plain_row(image=f"no{i}.png") for i in range(8)]]
    with pytest.raises(DataError, match="is data.image_root .* the right folder"):
        load_rows(folder, rows)
    with pytest.raises(DataError) as caught:
        load_rows(folder, [plain_row(image="a.png"), *rows])
    assert "right folder" not in str(caught.value)


def test_image_that_changes_after_the_check_names_its_line(folder):
    dataset = load_rows(folder, [plain_row(), plain_row(image="a.png")])
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: image 'a\.png'"):
        dataset[1]


def test_every_image_is_decoded_once_at_construction(folder, monkeypatch):
    decoded = []
    plain_decode_image = data.decode_image

    def recorded(stream, what):
        decoded.append(what)
        return plain_decode_image(stream, what)

    monkeypatch.setattr(data, "decode_image", recorded)
    load_rows(folder, [plain_row(image="a.png"), plain_row(images=["a.png", "b.png"])])
    assert sorted(decoded) == ["image 'a.png'", "image 'b.png'"]


def test_a_path_through_a_folder_that_is_not_there_is_checked_and_hashed(folder):
    """It names the same file as the plain path, which the operating system would not open."""
    rows = [plain_row(image="nowhere/../a.png"), plain_row(image="nowhere/../c.png")]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        dataset = load_rows(folder, rows, on_error="skip")
    assert len(dataset) == 1
    plain = load_rows(folder, [plain_row(image="a.png")])
    assert list(dataset._image_hashes.values()) == list(plain._image_hashes.values())
    assert dataset[0].images[0].size == plain[0].images[0].size


def test_broken_images_keep_no_pixels_alive(tmp_path):
    """A stored exception keeps its traceback, whose frames keep half-decoded images.

    A thousand of them are gigabytes.
    """
    noise().save(tmp_path / "t.png")
    (tmp_path / "t.png").write_bytes((tmp_path / "t.png").read_bytes()[:3000])
    problems: dict[int, DataError] = {}
    dataset = load_rows(tmp_path, [plain_row()])
    dataset.rows = [parse_row(json.dumps(plain_row(image="t.png")).encode(), 1)]
    dataset._check_images(problems)
    assert problems[1].__traceback__ is None
    assert problems[1].__cause__ is None
    assert problems[1].__context__ is None


def test_warning_about_text_before_the_image(folder):
    rows = [
        plain_row(image="a.png"),
        plain_row("Look: <image> what?", image="a.png"),
        chat_row("See <image>"),
        chat_row("\n<image>x") | {"id": "d"},
    ]
    with pytest.warns(UserWarning, match=r"in 2 rows \(first: line 2\)") as caught:
        load_rows(folder, rows)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows(folder, [plain_row(image="a.png"), chat_row(), plain_row("text only")])


def test_progress_is_silent_on_request(folder, capfd):
    load_rows(folder, [plain_row(image="a.png")])
    assert capfd.readouterr() == ("", "")
    load_rows(folder, [plain_row(image="a.png")], progress=True)
    assert "rows.jsonl: checking images" in capfd.readouterr().err


# ---------------------------------------------------------------- prompts


def sample_of(question: str, *sizes: tuple[int, int]) -> Sample:
    colors = ["red", "green", "blue"]
    images = [Image.new("RGB", size, color) for size, color in zip(sizes, colors, strict=False)]
    return Sample("s", tuple(images), question, "3")


def expected_ids(tokenizer, user: str) -> list[int]:
    """Byte-level ids by hand: special tokens by name, "he" merged, else a token per byte."""
    text = f"{SYSTEM}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    ids = []
    while text:
        known = [piece for piece in (*SPECIAL, "he") if text.startswith(piece)]
        piece = known[0] if known else text[0]
        symbol = {" ": "Ġ", "\n": "Ċ"}.get(piece, piece)
        ids.append(tokenizer.convert_tokens_to_ids(symbol))
        text = text[len(piece) :]
    return ids


def test_prompt_of_two_interleaved_images(tokenizer, processor):
    sample = sample_of("<image>Is the first <image> red?", (56, 28), (84, 56))
    prompt = encode_prompt(sample, 5, tokenizer, processor, TEMPLATE)
    pads = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (2, 6)]
    user = f"{pads[0]}Is the first {pads[1]} red?\nThink first."
    assert prompt.input_ids.tolist() == expected_ids(tokenizer, user)
    assert prompt.input_ids.dtype == torch.int64
    assert prompt.visual_mask.dtype == torch.bool
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert prompt.visual_mask.tolist() == [token == image_id for token in prompt.input_ids.tolist()]
    assert int(prompt.visual_mask.sum()) == 8
    assert prompt.image_grid_thw.tolist() == [[1, 2, 4], [1, 4, 6]]
    assert prompt.pixel_values.shape == (8 + 24, 3 * 2 * 14 * 14)
    assert prompt.pixel_values.dtype == torch.float32
    assert (prompt.index, prompt.id, prompt.answer) == (5, "s", "3")
    assert prompt.question == sample.question


def test_prompt_without_images(tokenizer, processor):
    prompt = encode_prompt(sample_of("What?"), 0, tokenizer, processor, TEMPLATE)
    assert prompt.input_ids.tolist() == expected_ids(tokenizer, "What?\nThink first.")
    assert prompt.pixel_values is None
    assert prompt.image_grid_thw is None
    assert prompt.visual_mask.shape == prompt.input_ids.shape
    assert not prompt.visual_mask.any()


def test_pixels_are_in_the_order_of_the_markers(tokenizer, processor):
    sample = sample_of("<image>a<image>b", (28, 28), (28, 28))  # red, green
    prompt = encode_prompt(sample, 0, tokenizer, processor, TEMPLATE)
    channels = prompt.pixel_values.view(2, 4, 3, -1).mean((1, 3))  # [image, RGB]
    assert channels.argmax(dim=1).tolist() == [0, 1]


def test_an_odd_image_does_not_change_its_neighbour(tokenizer, processor):
    one_image = sample_of("<image>x", (100, 70))
    two_images = sample_of("<image>x<image>", (100, 70), (1, 3))
    alone = encode_prompt(one_image, 0, tokenizer, processor, TEMPLATE)
    both = encode_prompt(two_images, 0, tokenizer, processor, TEMPLATE)
    assert torch.equal(both.pixel_values[: len(alone.pixel_values)], alone.pixel_values)
    assert torch.equal(both.image_grid_thw[:1], alone.image_grid_thw)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((1, 1), (2, 2)),
        ((3, 3), (2, 2)),
        ((28, 28), (2, 2)),
        ((3, 90), (60, 2)),
        ((90, 3), (2, 60)),
        ((56, 27), (2, 4)),
    ],
)
def test_tiny_images_are_enlarged_keeping_their_aspect(tokenizer, processor, size, grid):
    """The processor alone would make a 3 x 90 image 28 x 168.

    Its smart_resize rounds the short side to zero first.
    """
    prompt = encode_prompt(sample_of("<image>x", size), 0, tokenizer, processor, TEMPLATE)
    assert prompt.image_grid_thw.tolist() == [[1, *grid]]


def test_the_factor_comes_from_the_processor(tokenizer):
    """With 16-pixel patches the unit is 32: a constant 28 would give another grid."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64}, merge_size=2
    )
    prompt = encode_prompt(sample_of("<image>x", (2, 20)), 0, tokenizer, processor, TEMPLATE)
    assert prompt.image_grid_thw.tolist() == [[1, 20, 2]]  # 32 x 320 pixels
    assert int(prompt.visual_mask.sum()) == 10
    counted = data.count_prompt_tokens("<image>x", [(2, 20)], tokenizer, processor, TEMPLATE)
    assert counted == len(prompt.input_ids)


def test_enlarged_size():
    assert data.enlarged_size((1, 1), 28) == (28, 28)
    assert data.enlarged_size((14, 100), 28) == (28, 200)
    assert data.enlarged_size((15, 100), 28) == (15, 100)  # as the stock processor has it
    assert data.enlarged_size((30, 40), 28) == (30, 40)
    assert data.enlarged_size((200, 1), 28) == (5600, 28)  # never past the aspect limit


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 64))
def test_enlarged_size_properties(width, height, factor):
    new = data.enlarged_size((width, height), factor)
    assert round(min(new) / factor) >= 1  # what smart_resize does not round to nothing
    assert new == (width, height) or min(new) == factor
    if max(width, height) <= 200 * min(width, height):
        assert max(new) <= 200 * min(new)


@pytest.mark.parametrize("template", ["no place", "{question} {question}", "{Question}"])
def test_template_needs_exactly_one_question(tokenizer, processor, template):
    with pytest.raises(DataError, match="data.prompt_template .*expected exactly one"):
        encode_prompt(sample_of("x"), 0, tokenizer, processor, template)


def test_template_is_not_a_format_string(tokenizer, processor):
    question = r"Is \frac{1}{2} in {question} or {0.__class__}?"
    template = r"{question} Put it in \boxed{}."
    prompt = encode_prompt(sample_of(question), 0, tokenizer, processor, template)
    assert prompt.input_ids.tolist() == expected_ids(tokenizer, question + r" Put it in \boxed{}.")


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_template_or_question_are_refused(tokenizer, processor, token):
    for question, template in ((f"a{token}b", TEMPLATE), ("a", "{question}" + token)):
        with pytest.raises(DataError, match="would be read as that special token"):
            encode_prompt(sample_of(question), 0, tokenizer, processor, template)


def test_half_of_a_surrogate_pair_is_no_question(tokenizer, processor):
    """As a terminal that does not write UTF-8 gives it to a command."""
    with pytest.raises(DataError, match=r"the question is 'Gr\\udcf6ße\?'; expected text in UTF-8"):
        encode_prompt(sample_of("Gr\udcf6ße?"), 0, tokenizer, processor, TEMPLATE)


def test_special_tokens_of_this_tokenizer_are_refused(processor):
    tokenizer = make_tokenizer(extra_special_tokens=[*SPECIAL, "<|box_start|>"])
    with pytest.raises(DataError, match=r"box_start"):
        encode_prompt(sample_of("a<|box_start|>b"), 0, tokenizer, processor, TEMPLATE)


def test_marker_and_image_counts_must_match(tokenizer, processor):
    size = (28, 28)
    message = "sample 's': found .* images.*expected the same number"
    for sample, template in (
        (sample_of("<image><image>x", size), TEMPLATE),
        (sample_of("x", size), TEMPLATE),
        (sample_of("<image>x"), TEMPLATE),
        (sample_of("<image>x", size), "<image>{question}"),
    ):
        with pytest.raises(DataError, match=message):
            encode_prompt(sample, 0, tokenizer, processor, template)


def test_chat_template_that_drops_images_is_refused(processor):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for part in messages[0]['content'] %}{{ part.get('text', '') }}{% endfor %}"
    )
    with pytest.raises(DataError, match="after the chat template, 0 image placeholders"):
        encode_prompt(sample_of("<image>x", (28, 28)), 0, tokenizer, processor, TEMPLATE)


def test_image_token_comes_from_the_tokenizer(processor):
    tokenizer = make_tokenizer(extra_special_tokens=[*SPECIAL, "<|pic|>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|image_pad|>", "<|pic|>")
    tokenizer.image_token = "<|pic|>"
    prompt = encode_prompt(sample_of("<image>x", (56, 28)), 0, tokenizer, processor, TEMPLATE)
    picture_id = tokenizer.convert_tokens_to_ids("<|pic|>")
    assert prompt.input_ids[prompt.visual_mask].tolist() == [picture_id] * 2


def test_tokenizer_without_an_image_token_is_refused(processor):
    """Qwen2Tokenizer maps an unknown token to <|endoftext|>, which would be the placeholder."""
    tokenizer = make_tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    with pytest.raises(DataError, match=r"no token <\|image_pad\|>"):
        encode_prompt(sample_of("<image>x", (28, 28)), 0, tokenizer, processor, TEMPLATE)


def test_prompt_length_limit(tokenizer, processor):
    sample = sample_of("<image>x", (84, 56))
    length = len(encode_prompt(sample, 0, tokenizer, processor, TEMPLATE).input_ids)
    just_right = encode_prompt(sample, 0, tokenizer, processor, TEMPLATE, max_prompt_tokens=length)
    assert len(just_right.input_ids) == length
    message = (
        f"'s': .*{length} tokens.*at most {length - 1} .*data.max_prompt_tokens.*data.max_pixels"
    )
    with pytest.raises(DataError, match=message):
        encode_prompt(sample, 0, tokenizer, processor, TEMPLATE, length - 1)


def test_extreme_aspect_in_a_sample_from_elsewhere(tokenizer, processor):
    with pytest.raises(DataError, match="'s': an image has 300 x 1 pixels"):
        encode_prompt(sample_of("<image>x", (300, 1)), 0, tokenizer, processor, TEMPLATE)


def is_allowed(size: tuple[int, int]) -> bool:
    return max(size) <= 200 * min(size)


SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400)).filter(is_allowed)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(st.lists(SIZES, max_size=3), TEXTS)
def test_counted_length_is_the_encoded_length(tokenizer, processor, sizes, text):
    # Strings of the sources are drawn as well, and these are errors in a text.
    assume(not any(token in text for token in [*tokenizer.all_special_tokens, "<image>"]))
    question = text.join(["<image>"] * len(sizes)) + text
    sample = sample_of(question, *sizes)
    counted = data.count_prompt_tokens(question, sizes, tokenizer, processor, TEMPLATE)
    assert counted == len(encode_prompt(sample, 0, tokenizer, processor, TEMPLATE).input_ids)


def test_check_lengths_reports_and_skips(folder, tokenizer, processor):
    rows = [plain_row("x" * (100 if i % 2 else 1), image="a.png") for i in range(50)]
    dataset = load_rows(folder, rows)
    short = len(encode_prompt(dataset[0], 0, tokenizer, processor, TEMPLATE).input_ids)
    check_lengths(dataset, tokenizer, processor, TEMPLATE, short + 99)
    check_lengths(dataset, tokenizer, processor, TEMPLATE, None)
    assert len(dataset) == 50
    message = f"25 of 50 rows.*\n  line 2: the prompt has {short + 99} tokens"
    with pytest.raises(DataError, match=message) as caught:
        check_lengths(dataset, tokenizer, processor, TEMPLATE, short)
    assert "and 5 more" in str(caught.value)
    assert str(caught.value).count("line ") == 20
    assert len(dataset) == 50

    skipping = load_rows(folder, rows, on_error="skip")
    with pytest.warns(UserWarning, match="25 of 50 rows"):
        check_lengths(skipping, tokenizer, processor, TEMPLATE, short)
    assert len(skipping) == 25
    assert skipping[1].id == "3"
    with pytest.raises(DataError, match="25 of 25 rows"):
        check_lengths(skipping, tokenizer, processor, TEMPLATE, 1)


def test_check_lengths_decodes_nothing(folder, tokenizer, processor, monkeypatch):
    dataset = load_rows(folder, [plain_row("<image>a<image>", images=["a.png", "b.png"])])
    length = len(encode_prompt(dataset[0], 0, tokenizer, processor, TEMPLATE).input_ids)

    def decoded(*_):
        pytest.fail("decoded")

    monkeypatch.setattr(data, "load_image", decoded)
    check_lengths(dataset, tokenizer, processor, TEMPLATE, length)
    with pytest.raises(DataError, match=f"{length} tokens"):
        check_lengths(dataset, tokenizer, processor, TEMPLATE, length - 1)


def test_check_lengths_blames_the_template_not_the_rows(folder, tokenizer, processor):
    dataset = load_rows(folder, [plain_row()], on_error="skip")
    for template in ("none", "{question}<|im_end|>"):
        with pytest.raises(DataError, match="^data.prompt_template"):
            check_lengths(dataset, tokenizer, processor, template, 1000)


def test_check_lengths_finds_special_tokens_of_the_tokenizer(folder, processor):
    tokenizer = make_tokenizer(extra_special_tokens=[*SPECIAL, "<|box_start|>"])
    dataset = load_rows(folder, [plain_row(), plain_row("a<|box_start|>")])
    with pytest.raises(DataError, match=r"line 2: the question contains <\|box_start\|>"):
        check_lengths(dataset, tokenizer, processor, TEMPLATE, None)


# ---------------------------------------------------------------- sampler


def test_every_epoch_is_another_permutation():
    sampler = Sampler(50, seed=1)
    epochs = [sampler.take(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert Sampler(50, 1).take(100) == Sampler(50, 1).take(100)
    assert Sampler(50, 1).take(50) != Sampler(50, 2).take(50)
    # seed + epoch as the key would make epoch 1 of seed 1 the epoch 0 of seed 2
    assert Sampler(50, 1).take(100)[50:] != Sampler(50, 2).take(50)


def test_the_order_does_not_depend_on_how_python_hashes_strings():
    code = "import random; r = list(range(9)); random.Random('3/4').shuffle(r); print(r)"
    orders = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        orders.add(done.stdout)
    assert len(orders) == 1


def test_pinned_order():
    """A silent change of the order would make an old checkpoint resume on other data."""
    assert Sampler(6, seed=0).take(8) == [0, 5, 1, 4, 3, 2, 2, 0]


@given(st.integers(1, 12), st.integers(0, 5), st.lists(st.integers(0, 30), max_size=6))
def test_chunks_and_resumption_do_not_change_the_stream(size, seed, counts):
    whole = Sampler(size, seed).take(sum(counts))
    pieces, state = [], {"consumed": 0}
    for count in counts:
        sampler = Sampler(size, seed)
        sampler.load_state_dict(json.loads(json.dumps(state)))
        pieces += sampler.take(count)
        state = sampler.state_dict()
    assert pieces == whole
    assert state == {"consumed": sum(counts)}


def test_rewinding_a_sampler():
    sampler = Sampler(5, 0)
    first = sampler.take(13)
    sampler.load_state_dict({"consumed": 2})
    assert sampler.take(11) == first[2:]


@pytest.mark.parametrize(
    "state", [{}, {"consumed": -1}, {"consumed": "3"}, {"consumed": True}, {"consumed": 1.0}]
)
def test_bad_sampler_state(state):
    with pytest.raises(DataError, match='"consumed"'):
        Sampler(5, 0).load_state_dict(state)


def test_bad_sampler_arguments():
    with pytest.raises(DataError, match="at least one"):
        Sampler(0, 0)
    with pytest.raises(DataError, match="expected 0 or more"):
        Sampler(3, 0).take(-1)


# ---------------------------------------------------------------- import


def test_importing_does_nothing():
    """Not even loading transformers, which takes seconds."""
    code = "import sys, data; assert 'transformers' not in sys.modules"
    root = Path(data.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
