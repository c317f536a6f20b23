"""Visual-head scores: where words stand, what counts as a hit, and runs that are interrupted."""

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sglang_hybridkv.cli.calibrate import calibrate, partial_path
from sglang_hybridkv.cli.pages import RenderedPages, draw_page
from sglang_hybridkv.cli.samples import FolderSamples, Sample, write_samples
from sglang_hybridkv.cli.vision_model import Observation, TopKeys, VisionModel, read_facts
from sglang_hybridkv.cli.visual_heads import VisualGrid, score_hits, words_of_tokens
from sglang_hybridkv.compressors.calibration import CalibratedModel, load_calibration
from tests.builders import fresh_generator

FACTS = CalibratedModel(name="toy", num_layers=2, num_kv_heads=2, head_dim=8, fingerprint="f")


@pytest.fixture(scope="module")
def model(vl_model):
    return VisionModel(vl_model, "cpu")


def short_page(seed, num_words=12):
    """A page of which only the first words are asked for: the tests need no more."""
    page = draw_page(random.Random(seed))
    words = page.answer.split()[:num_words]
    return Sample(page.image, page.question, " ".join(words), page.boxes[:num_words])


class ShortPages:
    identity = "short pages"

    def __init__(self, num_samples=3):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, sample_idx):
        return short_page(sample_idx)


class RandomLooks:
    """A model whose heads look at random: the same for the same sample, different for each."""

    facts = FACTS

    def observe(self, sample):
        generator = torch.Generator().manual_seed(sample.image.width * sample.image.height + len(sample.answer))
        words = list(range(len(sample.boxes)))
        grid = VisualGrid(3, 3, *sample.image.size)
        return Observation(torch.randint(-1, 9, (2, 4, len(words)), generator=generator), words, grid)


class TestWhereWordsStand:
    def test_a_box_takes_every_token_that_it_overlaps_and_no_other(self):
        rng = random.Random(int(torch.randint(2**31, (1,), generator=fresh_generator())))
        grid = VisualGrid(rows=7, columns=4, width=100, height=161)
        for _ in range(200):
            left, right = sorted(rng.sample(range(101), 2))
            top, bottom = sorted(rng.sample(range(162), 2))
            overlapped = [
                row * 4 + column
                for row in range(7)
                for column in range(4)
                if left < (column + 1) * 25 and column * 25 < right and top < (row + 1) * 23 and row * 23 < bottom
            ]
            assert grid.tokens_in((left, top, right, bottom)) == overlapped

    def test_tokens_belong_to_the_word_that_they_spell(self):
        #          r e d _ f o x _ _ o w l
        offsets = [(0, 2), (2, 3), (3, 7), (7, 8), (8, 10), (10, 12), (2, 5), (5, 5)]
        assert words_of_tokens("red fox  owl", offsets) == [0, 0, 1, None, 2, 2, None, None]


class TestHits:
    def test_a_hand_made_pattern_scores_as_counted_by_hand(self):
        grid = VisualGrid(rows=2, columns=4, width=8, height=4)
        boxes = [(0, 0, 4, 2), (6, 2, 8, 4)]  # tokens 0 1, and token 7
        words = [0, None, 1, 1]
        top = torch.tensor([[[0, 0, 7, 7], [1, 0, 6, 7], [2, 7, 0, 1]], [[-1, 7, -1, -1], [1, 1, 1, 1], [4, 7, 7, 3]]])
        expected = [[0.5 + 1 + 1, 0.5 + 1, 0], [0, 0.5, 1]]
        assert score_hits(top, words, boxes, grid).tolist() == expected

    def test_a_head_that_looks_at_each_word_gets_the_largest_score_there_is(self):
        generator = fresh_generator()
        grid = VisualGrid(rows=6, columns=6, width=60, height=60)
        boxes = [(x, y, x + 14, y + 7) for x, y in torch.randint(0, 46, (5, 2), generator=generator).tolist()]
        words = torch.randint(0, 5, (30,), generator=generator).tolist()
        best = torch.tensor([grid.tokens_in(boxes[word])[0] for word in words])
        top = torch.randint(-1, 36, (3, 4, 30), generator=generator)
        top[1, 2] = best
        scores = score_hits(top, words, boxes, grid)
        assert scores[1, 2] == pytest.approx(sum(1 / len(grid.tokens_in(boxes[word])) for word in words))
        assert (scores <= scores[1, 2]).all()
        assert (scores >= 0).all()

    @pytest.mark.parametrize("top_of", ["visual", "all"])
    def test_top_keys_are_those_of_plain_causal_attention(self, top_of):
        generator = fresh_generator()
        query = torch.randn(6, 20, 16, generator=generator)
        key = torch.randn(3, 20, 16, generator=generator)
        watched = TopKeys(top_of)
        watched.watch(rows=torch.arange(12, 19), visual=torch.arange(2, 10))
        top = watched.top_keys(query, key)
        assert top.shape == (6, 7)
        for q_head in range(6):
            for i, row in enumerate(range(12, 19)):
                weights = key[q_head // 2, : row + 1] @ query[q_head, row]
                best = int(weights[2:10].argmax())
                elsewhere = top_of == "all" and not 2 <= int(weights.argmax()) < 10
                assert top[q_head, i] == (-1 if elsewhere else best)


class TestModel:
    def test_looks_where_eager_attention_looks(self, vl_model, model):
        """bf16 rounds differently in both, so near ties may go either way."""
        from transformers import AutoModelForImageTextToText

        eager = AutoModelForImageTextToText.from_pretrained(vl_model, dtype="auto", attn_implementation="eager").eval()
        sample = short_page(5)
        inputs, words = model._inputs(sample)
        seen = model.observe(sample)
        with torch.inference_mode():
            attentions = eager.model(**inputs, use_cache=False, output_attentions=True).attentions
        visual = (inputs["input_ids"][0] == eager.config.image_token_id).nonzero()[:, 0]
        assert len(visual) == seen.grid.rows * seen.grid.columns
        num_tokens = inputs["input_ids"].shape[1]
        rows = slice(num_tokens - len(words) - 1, num_tokens - 1)
        weights = torch.stack(attentions)[:, 0, :, rows][..., visual].float()
        at_ours = weights.gather(-1, seen.top_LHT[..., None])[..., 0]
        assert seen.top_LHT.shape == (4, 8, len(words))
        assert (at_ours >= 0.9 * weights.amax(-1)).float().mean() > 0.99
        assert (weights.amax(-1) > 1.5 * weights.mean(-1)).float().mean() > 0.9
        counted = [word for word in seen.words if word is not None]
        assert counted == sorted(counted)
        assert set(counted) == set(range(len(sample.boxes)))

    def test_facts_are_those_of_the_checkpoint(self, vl_model):
        facts = read_facts(vl_model)
        assert (facts.name, facts.num_layers, facts.num_kv_heads, facts.head_dim) == ("tiny-qwen2_5_vl", 4, 4, 32)
        assert len(facts.fingerprint) == 64

    def test_facts_of_a_flat_config(self, tmp_path):
        """As the published Qwen2.5-VL checkpoints have it."""
        config = {"model_type": "qwen2_5_vl", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 28}))
        facts = read_facts(tmp_path)
        assert (facts.num_layers, facts.num_kv_heads, facts.head_dim) == (28, 4, 128)


class TestRun:
    def run(self, out, **options):
        return calibrate(RandomLooks, FACTS, ShortPages(6), out, **options)

    def stop_after(self, num_samples):
        def stop(num_done):
            if num_done == num_samples:
                raise KeyboardInterrupt

        return stop

    def test_the_file_is_what_the_reader_expects(self, tmp_path):
        result = self.run(tmp_path / "scores.json")
        read = load_calibration(tmp_path / "scores.json", 2, 2, "f")
        assert read.model_dump() == result
        assert (read.model, read.num_samples) == (FACTS, 6)

    def test_kv_heads_get_the_mean_of_their_group_and_of_the_samples(self, tmp_path):
        result = self.run(tmp_path / "scores.json")
        plain = torch.zeros(2, 4, dtype=torch.float64)
        for sample_idx in range(6):
            sample = ShortPages()[sample_idx]
            seen = RandomLooks().observe(sample)
            plain += score_hits(seen.top_LHT, seen.words, sample.boxes, seen.grid) / 6
        expected = torch.stack((plain[:, :2].mean(1), plain[:, 2:].mean(1)), 1)
        assert torch.allclose(torch.tensor(result["scores"], dtype=torch.float64), expected)

    @pytest.mark.parametrize("num_done", [0, 1, 4, 6])
    def test_interrupted_and_resumed_equals_uninterrupted(self, tmp_path, num_done):
        whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
        self.run(whole)
        with pytest.raises(KeyboardInterrupt):
            self.run(parts, on_progress=self.stop_after(num_done))
        assert not parts.exists()
        done = []
        self.run(parts, resume=True, on_progress=done.append)
        assert done == list(range(num_done, 7))
        assert parts.read_bytes() == whole.read_bytes()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.json", "whole.json"]

    def test_unfinished_work_is_not_thrown_away(self, tmp_path):
        out = tmp_path / "scores.json"
        with pytest.raises(KeyboardInterrupt):
            self.run(out, on_progress=self.stop_after(2))
        kept = partial_path(out).read_bytes()
        with pytest.raises(ValueError, match=r"unfinished work; go on with --resume, or delete it"):
            self.run(out)
        with pytest.raises(ValueError, match=r"begun with top_of = 'visual', now it is 'all'"):
            self.run(out, resume=True, top_of="all")
        with pytest.raises(ValueError, match=r"begun with num_samples = 6, now it is 5"):
            calibrate(RandomLooks, FACTS, ShortPages(5), out, resume=True)
        assert partial_path(out).read_bytes() == kept

    @pytest.mark.parametrize("change", [{"kind": "other"}, {"num_done": 7}, {"sums": [[1.0]]}, {"sums": 3}])
    def test_a_corrupt_file_of_unfinished_work_is_refused(self, tmp_path, change):
        out = tmp_path / "scores.json"
        with pytest.raises(KeyboardInterrupt):
            self.run(out, on_progress=self.stop_after(2))
        partial = json.loads(partial_path(out).read_text())
        partial_path(out).write_text(json.dumps(partial | change))
        with pytest.raises(ValueError, match="corrupt; delete it and start again"):
            self.run(out, resume=True)

    def test_scores_that_are_all_zero_are_not_written(self, tmp_path):
        class Blind(RandomLooks):
            def observe(self, sample):
                seen = super().observe(sample)
                return Observation(torch.full_like(seen.top_LHT, -1), seen.words, seen.grid)

        with pytest.raises(ValueError, match="no head looked at a word of the 6 samples"):
            calibrate(Blind, FACTS, ShortPages(6), tmp_path / "scores.json")
        assert list(tmp_path.iterdir()) == []

    def test_the_model_is_not_loaded_when_nothing_could_be_written(self, tmp_path):
        def load():
            raise AssertionError("loaded")

        for out in (tmp_path, tmp_path / "missing" / "scores.json"):
            with pytest.raises(ValueError, match="--out"):
                calibrate(load, FACTS, ShortPages(), out)


class TestSamples:
    def test_pages_hold_ink_in_the_boxes_of_their_words_and_nowhere_else(self):
        page = draw_page(random.Random(int(torch.randint(2**31, (1,), generator=fresh_generator()))))
        assert len(page.boxes) == len(page.answer.split()) > 10
        pixels = np.asarray(page.image).astype(int)
        inked = np.abs(pixels - pixels[0, 0]).sum(-1) > 30
        for left, top, right, bottom in page.boxes:
            assert 0 <= left < right <= page.image.width
            assert 0 <= top < bottom <= page.image.height
            box = np.s_[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
            assert inked[box].any()
            inked[box] = False
        assert not inked.any()

    def test_a_page_depends_on_the_seed_and_its_number_only(self):
        first, second = RenderedPages(3, seed=1), RenderedPages(9, seed=1)
        assert first[2] == second[2]
        assert first[2].answer != first[1].answer != RenderedPages(3, seed=2)[1].answer

    def test_written_samples_are_read_back(self, tmp_path):
        samples = [short_page(i) for i in range(3)]
        assert write_samples(tmp_path, samples) == 3
        read = FolderSamples(tmp_path)
        assert len(read) == 3
        for sample, again in zip(samples, map(read.__getitem__, range(3)), strict=True):
            assert (again.question, again.answer, again.boxes) == (sample.question, sample.answer, sample.boxes)
            assert np.array_equal(np.asarray(again.image), np.asarray(sample.image))
        assert len(FolderSamples(tmp_path, 2)) == 2
        with pytest.raises(ValueError, match="there already"):
            write_samples(tmp_path, samples)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answer": 3}, "line 2: answer = 3; expected text"),
            ({"image": "no.png"}, "line 2: image = 'no.png'; there is no such file"),
            ({"question": " "}, "line 2: question = ' '; expected text"),
            ({"boxes": [[0, 0, 5, 5]]}, "line 2: boxes = 1 boxes; expected a list of 2"),
            ({"boxes": [[0, 0, 5, 5], [5, 5, 5, 9]]}, r"line 2: boxes = \[5, 5, 5, 9\]; expected \[left"),
            ({"boxes": None}, "line 2: boxes = None; expected a list of 2"),
        ],
    )
    def test_a_corrupt_record_is_named(self, tmp_path, change, message):
        page = Sample(Image.new("RGB", (40, 40)), "read", "two words", ((0, 0, 9, 9), (9, 9, 20, 20)))
        write_samples(tmp_path, [page, page])
        lines = (tmp_path / "samples.jsonl").read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | change)
        (tmp_path / "samples.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            FolderSamples(tmp_path)

    def test_a_box_outside_of_its_picture_and_a_broken_picture_are_named(self, tmp_path):
        write_samples(tmp_path, [Sample(Image.new("RGB", (40, 40)), "read", "word", ((0, 0, 41, 9),))])
        with pytest.raises(ValueError, match=r"line 1: boxes = \[0, 0, 41, 9\] lies outside of 40 x 40 pixels"):
            FolderSamples(tmp_path)[0]
        (tmp_path / "images" / "000000.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="line 1: image cannot be read"):
            FolderSamples(tmp_path)[0]
