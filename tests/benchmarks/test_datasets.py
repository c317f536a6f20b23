"""Loaders of MileBench, VATEX, NExT-QA and Video-ChatGPT, on small folders made here in their layouts."""

import base64
import csv
import json
import re
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.datasets import chat_message, dataset_names, load, load_cases, score_cases
from benchmarks.metrics import METRICS

DOCUMENT = Path(__file__).parents[2] / "docs" / "real-models.md"
COLOURS = ("red", "lime", "blue")


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_csv(file, rows):
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def mile_bench_record(**changes):
    instance = {
        "context": "First {image#1} then {image#2}, table {table#3}. Which is red?",
        "images_path": [f"{colour}.png" for colour in COLOURS],
        "choice_list": ["the first", "the second", "neither"],
    }
    record = {"sample_id": 7, "task_instruction_id": 1, "task_instance": instance, "response": "the first"}
    for name, value in changes.items():
        (instance if name in instance else record)[name] = value
    return record


def make_mile_bench(folder, name="SlideVQA", records=None, question_type="multi-choice"):
    records = [mile_bench_record()] if records is None else records
    meta = {"dataset": name, "task_instruction": ["Look.", "Look closely."], "question_type": question_type}
    write_json(folder / name / f"{name}.json", {"meta_data": meta, "data": records})
    (folder / name / "images").mkdir(exist_ok=True)
    for colour in COLOURS:
        Image.new("RGB", (8, 8), colour).save(folder / name / "images" / f"{colour}.png")
    return folder


def make_video(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(f"video {name}".encode())


def make_vatex(folder):
    make_video(folder / "videos", "abc_000001_000011.mp4", "def_000002_000012.mkv")
    records = [
        {"videoID": "abc_000001_000011", "enCap": ["A man runs.", "Someone runs."], "chCap": ["x"]},
        {"videoID": "def_000002_000012", "enCap": ["A dog barks."], "chCap": ["y"]},
    ]
    write_json(folder / "vatex_validation_v1.0.json", records)
    return folder


def nextqa_row(**changes):
    row = {"video": "401", "frame_count": "9", "question": "why is he running", "answer": "2", "qid": "3", "type": "CW"}
    return {**row, **{f"a{i}": f"reason {word}" for i, word in enumerate("vwxyz")}, **changes}


def make_nextqa(folder, **changes):
    make_video(folder / "NExTVideo" / "1164", "323.mp4")
    write_json(folder / "map_vid_vidorID.json", {"401": "1164/323"})
    write_csv(folder / "test.csv", [nextqa_row(**changes)])
    return folder


def make_video_chatgpt(folder):
    make_video(folder / "Test_Videos", "v_1.mp4")
    write_json(folder / "generic_qa.json", [{"video_name": "v_1", "Q": "What happens?", "A": "A man cooks."}])
    record = {"video_name": "v_1.mp4", "Q1": "Who cooks?", "Q2": "Is it a man?", "A": "A man."}
    write_json(folder / "consistency_qa.json", [record])
    return folder


MAKERS = {
    "milebench": make_mile_bench,
    "milebench/SlideVQA": make_mile_bench,
    "vatex": make_vatex,
    "nextqa-mc": make_nextqa,
    "nextqa-oe": lambda folder: make_nextqa(folder, answer="to catch the ball", additional_ref_answer="catch it"),
    "video-chatgpt": make_video_chatgpt,
}


class TestEverySet:
    @pytest.mark.parametrize("name", MAKERS)
    def test_questions_have_files_answers_and_a_metric_that_they_pass(self, tmp_path, name):
        cases = load_cases(name, MAKERS[name](tmp_path))
        assert len({case.key for case in cases}) == len(cases)
        for case in cases:
            (message,) = case.messages()
            kinds = [part["type"] for part in message["content"]]
            assert kinds.count("image_url") == len(case.example.images)
            assert kinds.count("video_url") == (case.example.video is not None)
            assert "text" in kinds
            assert case.key.startswith(case.example.task)
        if name != "vatex":  # its metric has to be installed and needs more than two questions
            scores = score_cases(cases, [case.example.answers[0] for case in cases])
            assert scores == dict.fromkeys({case.example.task for case in cases}, 1.0)
            assert max(score_cases(cases, ["zzz"] * len(cases)).values()) == 0

    def test_every_name_can_be_loaded(self):
        others = {name for name in dataset_names() if not name.startswith("milebench/")}
        assert others | {"milebench/SlideVQA"} == set(MAKERS)

    def test_limit_is_that_of_each_set(self, tmp_path):
        for name in ("SlideVQA", "DocVQA"):
            make_mile_bench(tmp_path, name, [mile_bench_record(sample_id=i) for i in range(5)])
        tasks = [example.task for example in load("milebench", tmp_path, 2)]
        assert tasks == ["milebench/DocVQA"] * 2 + ["milebench/SlideVQA"] * 2
        assert len(load("milebench/DocVQA", tmp_path)) == 5


class TestMileBench:
    def test_prompt_is_that_of_the_benchmark_with_images_where_the_text_names_them(self, tmp_path):
        (example,) = load("milebench/SlideVQA", make_mile_bench(tmp_path))
        asked = "Look closely.\nFirst {image#1} then {image#2}, table {image#3}. Which is red?\n"
        asked += "Choice list: \nA. the first\nB. the second\nC. neither\nYour answer is: "
        assert example.question == asked
        assert example.answers == ("the first", "the first", "the second", "neither")
        assert (example.id, example.task, example.metric) == ("7", "milebench/SlideVQA", "multiple_choice")
        content = chat_message(example)["content"]
        assert [part["type"] for part in content] == ["text", "image_url"] * 3 + ["text"]
        assert "".join(part.get("text", "#") for part in content) == re.sub(r"{image#\d}", "#", asked)
        for part, path in zip(content[1::2], example.images, strict=True):
            kind, data = part["image_url"]["url"].split(",")
            assert kind == "data:image/png;base64"
            assert base64.b64decode(data) == path.read_bytes()

    def test_placeholders_are_numbered_in_order_unless_one_comes_twice(self, tmp_path):
        contexts = {
            "{image#1} {table#1} {image#2}": "{image#1} {image#2} {image#3}",
            "{image#3} {image#1} {image#3} {image#1}": "{image#3} {image#1} {image#3} {image#1}",
            "{image#2} only": "{image#2} only",
        }
        for context, numbered in contexts.items():
            make_mile_bench(tmp_path, records=[mile_bench_record(context=context)])
            (example,) = load("milebench/SlideVQA", tmp_path)
            assert example.question.split("\n")[1] == numbered
        kinds = [part["type"] for part in chat_message(example)["content"]]
        assert kinds == ["image_url", "image_url", "text", "image_url", "text"], "images not named come first"

    @pytest.mark.parametrize(
        ("name", "question_type", "metric"),
        [
            ("Spot-the-Diff", "open-ended", "rouge_l"),
            ("MMCoQA", "open-ended", "contains"),
            ("WebQA", "multi-choice", "multiple_choice"),
        ],
    )
    def test_metric_follows_the_question_type(self, tmp_path, name, question_type, metric):
        (example,) = load(f"milebench/{name}", make_mile_bench(tmp_path, name, question_type=question_type))
        assert example.metric == metric

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"context": True}, "record 1: context = True; expected text"),
            ({"context": "{image#4}"}, r"record 1: context = '{image#4}'; expected images from 1 to 3"),
            ({"images_path": ["no.png"]}, r"record 1: images_path = \['no.png'\]; .*no.png is not there"),
            ({"images_path": []}, r"record 1: images_path = \[\]; expected a list of texts"),
            (
                {"response": "the fourth"},
                "record 1: response = 'the fourth'; expected one of task_instance.choice_list",
            ),
            ({"task_instruction_id": 2}, "record 1: task_instruction_id = 2; expected a number from 0 to 1"),
            ({"task_instance": 3}, "record 1: task_instance = 3; expected an object"),
        ],
    )
    def test_a_corrupt_record_is_named(self, tmp_path, changes, message):
        make_mile_bench(tmp_path, records=[mile_bench_record(), mile_bench_record(**changes)])
        with pytest.raises(ValueError, match=rf"SlideVQA.json, {message}"):
            load("milebench/SlideVQA", tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "SlideVQA.json: cannot be read as JSON"),
            ("[]", "SlideVQA.json, .*expected an object"),
            ('{"meta_data": {}, "data": []}', "task_instruction = None; expected a list of texts"),
            (
                '{"meta_data": {"task_instruction": ["a"], "question_type": "riddle"}, "data": []}',
                "question_type = 'riddle'; expected one of open-ended, multi-choice",
            ),
            (
                '{"meta_data": {"task_instruction": ["a"], "question_type": "open-ended"}, "data": 5}',
                "SlideVQA.json: expected a list of records, got int",
            ),
            (
                '{"meta_data": {"task_instruction": ["a"], "question_type": "open-ended"}, "data": []}',
                "no question for milebench/SlideVQA",
            ),
        ],
    )
    def test_a_corrupt_file_is_named(self, tmp_path, text, message):
        make_mile_bench(tmp_path)
        (tmp_path / "SlideVQA" / "SlideVQA.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load("milebench/SlideVQA", tmp_path)


class TestVideo:
    def test_vatex_takes_all_captions_as_references(self, tmp_path):
        first, second = load("vatex", make_vatex(tmp_path))
        assert first.answers == ("A man runs.", "Someone runs.")
        assert second.video == tmp_path / "videos" / "def_000002_000012.mkv"
        url = chat_message(first)["content"][0]["video_url"]["url"]
        assert url.startswith("data:video/mp4;base64,")
        assert base64.b64decode(url.split(",")[1]) == b"video abc_000001_000011.mp4"

    def test_nextqa_choices(self, tmp_path):
        (example,) = load("nextqa-mc", make_nextqa(tmp_path))
        assert example.question.splitlines()[:3] == ["why is he running", "A. reason v", "B. reason w"]
        assert example.answers == ("reason x", "reason v", "reason w", "reason x", "reason y", "reason z")
        assert (example.id, example.video) == ("401-3", tmp_path / "NExTVideo" / "1164" / "323.mp4")

    def test_nextqa_without_a_map_finds_videos_by_their_number(self, tmp_path):
        make_nextqa(tmp_path)
        (tmp_path / "map_vid_vidorID.json").unlink()
        with pytest.raises(ValueError, match=r"test.csv, record 0: video = '401'; there is no video 401 \(.avi, "):
            load("nextqa-mc", tmp_path)
        make_video(tmp_path, "401.mp4")
        assert load("nextqa-mc", tmp_path)[0].video == tmp_path / "401.mp4"

    def test_nextqa_open_ended_takes_both_answers(self, tmp_path):
        (example,) = load("nextqa-oe", MAKERS["nextqa-oe"](tmp_path))
        assert example.answers == ("to catch the ball", "catch it")
        make_nextqa(tmp_path, answer="to catch the ball", additional_ref_answer="")
        assert load("nextqa-oe", tmp_path)[0].answers == ("to catch the ball",)

    def test_video_chatgpt_asks_each_question_of_a_pair(self, tmp_path):
        examples = load("video-chatgpt", make_video_chatgpt(tmp_path))
        assert [(example.task, example.question) for example in examples] == [
            ("video-chatgpt/generic", "What happens?"),
            ("video-chatgpt/consistency", "Who cooks?"),
            ("video-chatgpt/consistency", "Is it a man?"),
        ]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"answer": "5"}, "test.csv, record 0: answer = '5'; expected a number from 0 to 4"),
            ({"video": "402"}, "map_vid_vidorID.json, record 0: 402 = None; expected text"),
        ],
    )
    def test_a_corrupt_row_is_named(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            load("nextqa-mc", make_nextqa(tmp_path, **changes))

    def test_two_caption_files_are_refused(self, tmp_path):
        make_vatex(tmp_path)
        write_json(tmp_path / "vatex_test.json", [])
        with pytest.raises(ValueError, match=r"expected one question file vatex\*.json, found 2"):
            load("vatex", tmp_path)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "limit", "message"),
        [
            ("imagenet", None, "data set = 'imagenet': expected one of milebench, milebench/CLEVR-Change"),
            ("vatex", 0, "limit = 0: expected at least 1"),
            ("vatex", None, r"expected one question file vatex\*.json, found 0"),
            ("nextqa-mc", None, "expected a question file named test.csv or val.csv"),
            ("video-chatgpt", None, "expected a question file named generic_qa.json or"),
            ("milebench", None, "expected folders of MileBench such as CLEVR-Change"),
            ("milebench/WebQA", None, "WebQA.json: cannot be read as JSON"),
        ],
    )
    def test_is_named(self, tmp_path, name, limit, message):
        with pytest.raises(ValueError, match=message):
            load(name, tmp_path, limit)

    def test_two_questions_with_one_id_are_refused(self, tmp_path):
        make_mile_bench(tmp_path, records=[mile_bench_record(), mile_bench_record()])
        with pytest.raises(ValueError, match="two questions of milebench/SlideVQA have the id 'milebench/SlideVQA/7'"):
            load_cases("milebench/SlideVQA", tmp_path)

    def test_answers_must_be_one_a_case(self, tmp_path):
        with pytest.raises(ValueError, match="expected one for each of the 1 cases, got 2"):
            score_cases(load_cases("milebench", make_mile_bench(tmp_path)), ["a", "b"])


def test_the_documented_script_runs(tmp_path, monkeypatch, capsys):
    """That of docs/real-models.md, with an endpoint that always says the same."""

    class Endpoint:
        def __init__(self, base_url, api_key):
            self.chat = types.SimpleNamespace(completions=self)

        def create(self, model, messages, max_tokens, temperature):
            assert [part["type"] for part in messages[0]["content"]].count("image_url") == len(COLOURS)
            return types.SimpleNamespace(
                choices=[types.SimpleNamespace(message=types.SimpleNamespace(content="the first"))]
            )

    records = [mile_bench_record(sample_id=0), mile_bench_record(sample_id=1, response="neither")]
    make_mile_bench(tmp_path / "MileBench", "Spot-the-Diff", records)
    (script,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.setitem(sys.modules, "openai", types.SimpleNamespace(OpenAI=Endpoint))
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert capsys.readouterr().out == "{'milebench/Spot-the-Diff': 0.5}\n"


def test_the_document_names_every_data_set_and_metric():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in [*METRICS, *dataset_names()] if name.removeprefix("milebench/") not in text] == []
