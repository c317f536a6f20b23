"""A page of pictures is, to the language model of a reader, what its text is."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.models.make_models import DEFAULT_DIR, train_pieces
from benchmarks.models.train_reader import NUM_PIECES, SPARE_IDS, cell_patches, make_reader, measure
from benchmarks.models.train_tiny import rope_positions
from benchmarks.pages import PageWriter, choose_pieces, draw_piece, piece_text, sources, squeeze
from benchmarks.scenes import CELL_PIXELS
from benchmarks.texts import SPLITS, draw_text, every_fact
from tests.builders import LAWS

SMOLLM2 = DEFAULT_DIR / "smollm2"
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason="make models-real was not run")
TEXT = "The access code of the blue gate is 4711. No part of this manual tells another one."
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n"), min_size=1)


def learn_tokenizer():
    """Byte pairs with special tokens where SmolLM2 has them."""
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<spare_{i}>" for i in range(3, 17))]
    raw = train_pieces([squeeze(text)[:20_000] for text in sources()], 768, special)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Folder of a random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("language"), learn_tokenizer()
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(language, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    accuracy = make_reader(language, folder, num_pieces=1024)
    assert (accuracy.right, accuracy.worst) == (1, 0)
    return folder


@pytest.fixture(scope="module")
def writer(reader):
    return PageWriter.load(reader)


@pytest.fixture(scope="module")
def speller(writer):
    """Knows little more than single characters."""
    return PageWriter(writer.tokenizer, frozenset(choose_pieces(writer.tokenizer, 110)))


@pytest.fixture(scope="module")
def model(reader):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(reader, dtype=torch.float32)


def ask_page(folder, writer, question, cells_per_line):
    """Inputs of the page TEXT and a question after it, as the processor makes them."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    message = writer.user_message(TEXT, question, cells_per_line)
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return processor(text=[prompt], images=writer.draw_lines(TEXT, cells_per_line), return_tensors="pt")


def text_ids(writer, inputs):
    """The prompt of `ask_page` with the text's pieces in place of its pictures."""
    ids = inputs["input_ids"].clone()
    ids[inputs["mm_token_type_ids"] == 1] = torch.tensor(writer.spell(TEXT))
    return ids


def test_different_words_look_different():
    words = [chr(code) for code in range(33, 127)] + ["the", "The", "THE", "tile", "title", "responsibilities"]
    pieces = [*words, *(f" {word}" for word in words), "\n", " "]
    assert len({draw_piece(piece).tobytes() for piece in pieces}) == len(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cells_are_the_embeddings_in_every_type(writer, model, dtype):
    pieces = sorted(writer.pieces)
    patches = cell_patches([piece_text(writer.tokenizer, piece) for piece in pieces])
    accuracy = measure(model.model.visual, patches, model.get_input_embeddings().weight[pieces].detach(), dtype)
    assert accuracy.right == 1
    # Twice float32's precision, for pixels that the image processor makes; what is rounded to fewer bits is exact.
    assert accuracy.worst < 1e-6


def test_special_tokens_are_not_drawn(writer):
    assert not {*range(3), *SPARE_IDS} & writer.pieces


@LAWS
@given(text=PRINTABLE, cells_per_line=st.integers(1, 40))
@example(text="the name <|image_pad|> of a special token", cells_per_line=8)
def test_ascii_text_survives_being_drawn(writer, speller, text, cells_per_line):
    for some in (writer, speller):
        spelled = some.spell(text)
        assert writer.tokenizer.decode(spelled) == text
        assert some.pieces.issuperset(spelled)
        lines = some.break_lines(spelled, cells_per_line)
        assert [piece for line in lines for piece in line] == spelled
        assert all(1 <= len(line) <= cells_per_line for line in lines)
        assert [line.size for line in some.draw_lines(text, cells_per_line)] == [
            (CELL_PIXELS * len(line), CELL_PIXELS) for line in lines
        ]


def test_numbers_are_not_broken(writer):
    lines = writer.break_lines(writer.spell("one 4711 two 4712 three 4713"), 8)
    texts = [writer.tokenizer.decode(line) for line in lines]
    assert len(lines) > 2
    assert all(text.startswith(" ") for text in texts[1:])


def test_sentences_are_not_broken_where_they_fit(writer):
    sentences = ["One sentence is here;", " another one is here.", " Then a line:\n", "apple: 17\n", "And the rest."]
    whole = max(len(writer.spell(sentence)) for sentence in sentences)
    for cells_per_line in range(whole, 4 * whole):
        lines = writer.break_lines(writer.spell("".join(sentences)), cells_per_line)
        assert all(writer.tokenizer.decode(line).endswith(tuple(sentences)) for line in lines)


def test_what_cannot_be_drawn_is_refused(writer, language, tmp_path):
    with pytest.raises(ValueError, match="printable ASCII"):
        writer.spell("日本")
    with pytest.raises(ValueError, match="cells_per_line: expected 1 to 199, got 200"):
        writer.draw_lines("a", 200)
    with pytest.raises(ValueError, match="pieces.json"):
        PageWriter.load(language)
    with pytest.raises(ValueError, match="language: expected a folder"):
        make_reader(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="num_pieces: expected a multiple of 256"):
        make_reader(language, tmp_path, num_pieces=1000)


def test_positions_along_a_page_are_those_of_text(reader, writer, model):
    """In transformers and in SGLang; the last component is the one that counts."""
    inputs, config = ask_page(reader, writer, "Which code?", 12), model.config
    ids, grids = inputs["input_ids"], inputs["image_grid_thw"]
    lines = writer.break_lines(writer.spell(TEXT), 12)
    assert grids.tolist() == [[1, 2, 2 * len(line)] for line in lines]  # nothing was resized
    positions, delta = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=grids)
    served, served_delta = rope_positions(config, ids, image_grid_thw=grids)
    assert positions[2, 0].tolist() == served[2, 0].tolist() == list(range(ids.shape[1]))
    assert delta.item() == served_delta.item() == 0
    assert config.text_config.rope_parameters["mrope_section"] == [0, 0, 8]


def test_other_drawings_are_noticed(reader):
    with mock.patch("benchmarks.pages.draw_piece", lambda text: 255 - draw_piece(text)):
        with pytest.raises(ValueError, match="other drawings"):
            PageWriter.load(reader)


@torch.inference_mode()
def test_language_model_is_the_one_it_was_made_of(language, writer, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(language)(TEXT)["input_ids"]])
    assert ids[0].tolist() == writer.tokenizer(TEXT)["input_ids"]
    expected, got = llama(ids).logits, model(ids).logits
    got[..., list(SPARE_IDS)] = expected[..., list(SPARE_IDS)]
    torch.testing.assert_close(got, expected)


@torch.inference_mode()
def test_page_is_to_the_language_model_what_the_text_is(reader, writer, model):
    inputs = ask_page(reader, writer, "Which code?", 12)
    ids = text_ids(writer, inputs)
    expected = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-3, atol=1e-3)


@needs_smollm2
def test_a_page_of_the_quality_bench_has_the_pieces_of_its_text():
    """Of both halves: pieces are the alphabet, not what was chosen on one half."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    writer = PageWriter(tokenizer, frozenset(choose_pieces(tokenizer, NUM_PIECES)))
    for split in SPLITS:
        for text in (
            *every_fact(split),
            *(draw_text(np.random.default_rng(seed), 7000, split=split).body for seed in range(3)),
        ):
            assert writer.spell(text) == tokenizer(text)["input_ids"]


@pytest.mark.slow
@needs_smollm2
def test_smollm2_reads_a_page(tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    accuracy = make_reader(SMOLLM2, tmp_path, num_pieces=2048)  # a tower of all of them takes minutes
    assert (accuracy.right, accuracy.worst) == (1, 0)
    writer = PageWriter.load(tmp_path)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    question = "What is the access code of the blue gate? Answer with the number only."
    inputs = ask_page(tmp_path, writer, question, 32)
    answer = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert "4711" in writer.tokenizer.decode(answer)


def test_a_page_leaves_out_what_cannot_be_drawn(writer: PageWriter) -> None:
    assert writer.draw_parts("café — naïve") == writer.draw_parts("cafe  naive")
