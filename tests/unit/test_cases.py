"""Inputs after public bug reports, each with the one right outcome (`pytest -m cases`).

Numbers are those of the collection that the reports were gathered in.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from distill_ray import cli
from distill_ray.corpus import load_tokenizer
from tests.assets import open_with_bos, tiny_teacher_folder
from tests.chat_templates import FAMILIES

pytestmark = pytest.mark.cases

RECIPE = """
name = "case"
version = "v1"
[storage]
root = "{folder}/root"
[corpus]
sources = ["{folder}/data/*"]
format = "{form}"
window_tokens = {window}
[teacher]
model = "{folder}/teacher"
engine = "transformers"
use_gpu = false
[student]
teacher_layers = [0]
[train]
pack_tokens = {window}
global_batch_tokens = {window}
precision = "fp32"
use_gpu = false
workers = {{ min = 1, max = 1 }}
"""
CHATML, QWEN3 = FAMILIES["chatml"].template, FAMILIES["qwen3"].template
ASSISTANT, END = "<|im_start|>assistant\n", "<|im_end|>"
RNG = random.Random(7)


WORDS = ("river", "mill", "stone", "grain", "wheel", "rain", "city", "answer", "value", "seven")


def prose(words: int) -> str:
    return " ".join(RNG.choice(WORDS) for _ in range(words))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


class Case:
    """A recipe over these records; the tiny teacher with this chat template and these end tokens."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        (folder / "data").mkdir()
        shutil.copytree(tiny_teacher_folder(), folder / "teacher")

    def write(self, *records: dict[str, Any], name: str = "a.jsonl") -> None:
        (self.folder / "data" / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def recipe(self, form: str, window: int = 512, capture: str = "") -> str:
        path = self.folder / "recipe.toml"
        path.write_text(RECIPE.format(folder=self.folder, form=form, window=window) + capture)
        return str(path)

    def template(self, text: str) -> None:
        (self.folder / "teacher/chat_template.jinja").write_text(text)

    def change(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.folder / "teacher" / name
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    def preview(self, recipe: str) -> tuple[list[dict[str, Any]], list[str]]:
        """What every document becomes, and why others become nothing."""
        assert cli.main(["preview", recipe, "--json", "--documents", "1000"]) == 0
        found = [json.loads(line) for line in self._capsys.readouterr().out.splitlines()]
        return [each for each in found if "ids" in each], [each["refused"] for each in found if "refused" in each]

    def check(self, recipe: str) -> tuple[int, str]:
        """Exit code, and all that was said."""
        self._capsys.readouterr()
        code = cli.main(["check", recipe])
        found = self._capsys.readouterr()
        return code, found.out + found.err

    def learned(self, found: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Text before each supervised span, and the span's own."""
        tokenizer = load_tokenizer(self.folder / "teacher")
        spans = []
        for each in found:
            on = [False, *each["supervised"], False]
            starts = [i for i in range(len(on) - 1) if on[i + 1] and not on[i]]
            stops = [i for i in range(len(on) - 1) if on[i] and not on[i + 1]]
            ids = each["ids"]
            spans += [
                (tokenizer.decode(ids[:a]), tokenizer.decode(ids[a:b])) for a, b in zip(starts, stops, strict=True)
            ]
        return spans


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tmp_path, capsys)


def chats(count: int, turns: int) -> list[dict[str, Any]]:
    return [
        {"messages": [m for _ in range(turns) for m in (user(f"{prose(5)} {i}?"), assistant(f"{prose(6)}."))]}
        for i in range(count)
    ]


def test_06_reasoning_kept_in_the_last_turn_only_gives_each_turn_its_own_prompt(case: Case) -> None:
    case.template(QWEN3)
    case.write(*chats(24, 2), name="multi.jsonl")
    case.write(*chats(24, 1), name="single.jsonl")
    found, refused = case.preview(case.recipe("messages"))
    spans = case.learned(found)
    assert not refused
    assert len(spans) == 72
    assert all(before.endswith(ASSISTANT) for before, _ in spans)
    assert all(said.startswith("<think>\n\n</think>\n\n") and said.endswith(f".{END}") for _, said in spans)
    assert all("<think>" not in before for before, _ in spans)


def test_07_an_eos_after_the_whole_chat_is_of_no_turn(case: Case) -> None:
    case.template(CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}")
    case.change("tokenizer_config.json", lambda data: data.update(eos_token="<|endoftext|>"))
    case.write(*chats(24, 2))
    found, refused = case.preview(case.recipe("messages"))
    assert not refused
    assert len(found) == 24
    assert all(said.endswith(f".{END}") for _, said in case.learned(found))


def test_09_the_marker_of_the_next_turn_ends_one(case: Case) -> None:
    case.template(
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|>{% endif %}"
    )
    for name in ("config.json", "generation_config.json"):
        case.change(name, lambda data: data.update(eos_token_id=1))
    case.change("tokenizer_config.json", lambda data: data.update(eos_token="<|im_start|>"))
    case.write(*({"messages": [user(f"how many {i}?"), assistant("seven.")]} for i in range(48)))
    found, refused = case.preview(case.recipe("messages"))
    assert not refused
    assert {said for _, said in case.learned(found)} == {"seven.<|im_start|>"}


def test_11_reasoning_that_the_template_drops_is_refused_and_found_by_check(case: Case) -> None:
    case.template(CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))
    case.write(*({"messages": [user("q"), assistant(f"<think>\ncount {i}\n</think>\n\nseven.")]} for i in range(48)))
    recipe = case.recipe("messages")
    found, refused = case.preview(recipe)
    assert not found
    assert all("the chat template drops what the assistant said: '\\ncount" in reason for reason in refused)
    code, said = case.check(recipe)
    assert code == 2
    assert "48 of 48 documents (100.00%) are refused: 48 × message 1: the chat template drops" in said
    assert "capture.max_refused=0.01" in said


TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}},
}


def call(city: str) -> list[dict[str, Any]]:
    return [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]


def test_12_a_tools_column_stands_where_the_template_puts_it(case: Case) -> None:
    case.template(CHATML)
    turns = [assistant("", tool_calls=call("x")), {"role": "tool", "content": "rain"}, assistant("rain.")]
    case.write(*({"tools": [TOOL], "messages": [user(f"weather {i}?"), *turns]} for i in range(48)))
    found, refused = case.preview(case.recipe("messages"))
    assert not refused
    assert len(found) == 48
    assert all(each["text"].startswith(f"<|im_start|>system\nTools: {json.dumps(TOOL)}{END}") for each in found)


def test_13_a_call_beside_null_content_is_learned(case: Case) -> None:
    case.template(CHATML)
    turns = [assistant(None, tool_calls=call("x")), {"role": "tool", "content": "rain"}, assistant("rain.")]
    case.write(
        *({"messages": [user(f"weather {i}?"), *turns]} for i in range(24)),
        *({"messages": [user(f"how many {i}?"), assistant("seven.")]} for i in range(24)),
    )
    found, refused = case.preview(case.recipe("messages"))
    assert not refused
    assert len(found) == 48
    said = [text for _, text in case.learned(found)]
    assert said.count(f'<tool_call>{{"name": "weather", "arguments": {{"city": "x"}}}}</tool_call>{END}') == 24
    assert (said.count(f"rain.{END}"), said.count(f"seven.{END}")) == (24, 24)


def test_15_content_in_parts_is_their_text_and_other_parts_are_refused_by_name(case: Case) -> None:
    part = {"type": "text", "text": "seven."}
    case.write(
        *({"messages": [user([{"type": "text", "text": f"how many {i}?"}]), assistant([part])]} for i in range(12)),
        *({"messages": [user(f"how many {i}?"), assistant("seven.")]} for i in range(36)),
        {"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}]), assistant("seven.")]},
    )
    found, (refused,) = case.preview(case.recipe("messages"))
    assert len(found) == 48
    assert {text for _, text in case.learned(found)} == {f"seven.{END}"}
    assert {found[i]["text"] for i in range(12)} == {found[i]["text"] for i in range(12, 24)}
    assert "part of type 'image_url'" in refused


def test_16_a_turn_of_weight_0_is_not_learned(case: Case) -> None:
    turns = [assistant("nine rivers.", weight=0), user("count again"), assistant("seven.", weight=1)]
    case.write(*({"messages": [user(f"how many {i}?"), *turns]} for i in range(48)))
    found, refused = case.preview(case.recipe("messages"))
    assert not refused
    assert len(found) == 48
    spans = case.learned(found)
    assert {said for _, said in spans} == {f"seven.{END}"}
    assert all("nine rivers." in before for before, _ in spans)


@pytest.mark.parametrize("form", ["text", "prompt_completion"])
def test_17_a_text_that_begins_with_bos_has_one(case: Case, form: str) -> None:
    bos = open_with_bos(case.folder / "teacher")
    case.write(
        *({"text": f"<|endoftext|>{prose(40)}", "prompt": f"<|endoftext|>{i}?", "completion": "x"} for i in range(8))
    )
    found, refused = case.preview(case.recipe(form))
    assert not refused
    assert all(each["ids"][0] == bos and each["ids"].count(bos) == 1 for each in found)


def test_19_a_text_ends_with_eos_and_it_is_learned(case: Case) -> None:
    case.write(*({"text": prose(30)} for _ in range(48)))
    found, _ = case.preview(case.recipe("text"))
    assert len(found) == 48
    assert all(each["ids"][-1] == 2 and each["supervised"][-1] for each in found)


def test_20_every_window_of_a_document_begins_with_bos_unlearned(case: Case) -> None:
    bos = open_with_bos(case.folder / "teacher")
    case.write(*({"text": prose(300)} for _ in range(24)))
    found, _ = case.preview(case.recipe("text", window=128))
    assert len(found) > 48
    assert all(each["ids"][0] == bos and not each["supervised"][0] for each in found)
    assert all(each["ids"].count(bos) == 1 for each in found)


def test_21_an_answer_beyond_the_window_is_refused_and_found_by_check(case: Case) -> None:
    case.write(*({"messages": [user(f"{prose(260)} {i}?"), assistant(prose(60))]} for i in range(24)))
    recipe = case.recipe("messages", window=128)
    found, refused = case.preview(recipe)
    assert not found
    assert all("more than corpus.window_tokens=128" in reason for reason in refused)
    code, said = case.check(recipe)
    assert code == 2
    assert "24 of 24 documents (100.00%) are refused" in said


def test_32_zstd_frames_that_are_skipped_hide_no_document(case: Case) -> None:
    def skip(size: int) -> bytes:
        return (0x184D2A50).to_bytes(4, "little") + size.to_bytes(4, "little") + b"\0" * size

    halves = ["".join(json.dumps({"text": prose(40)}) + "\n" for _ in range(24)).encode() for _ in range(2)]
    packed = [zstandard.ZstdCompressor().compress(half) for half in halves]
    (case.folder / "data/a.jsonl.zst").write_bytes(skip(4) + packed[0] + skip(4) + packed[1] + skip(17))
    found, refused = case.preview(case.recipe("text"))
    assert not refused
    assert len({each["record"] for each in found}) == 48


@pytest.mark.parametrize("name", ["array.jsonl", "zarray.json"])
def test_34_a_json_array_is_refused_by_the_name_of_its_file(case: Case, name: str) -> None:
    case.write(*({"text": prose(40)} for _ in range(48)), name="good.jsonl")
    (case.folder / "data" / name).write_text(json.dumps([{"text": prose(40)} for _ in range(200)]))
    code, said = case.check(case.recipe("text"))
    assert code == 2
    assert f"data/{name} begins with '[': it is a JSON array" in said


def test_35_prompts_without_a_question_are_refused_and_the_others_answered(case: Case) -> None:
    system = {"role": "system", "content": "you count"}
    case.write(
        {"messages": [system]},
        {"messages": [{"role": "system", "content": "you tell the weather"}]},
        *({"messages": [system, user(f"how many {i}?")]} for i in range(30)),
    )
    found, refused = case.preview(
        case.recipe("messages", capture='[capture]\nmode = "generate"\n[capture.generate]\nmax_tokens = 64\n')
    )
    assert len(found) == 30
    assert refused == ["no turn to answer: no message is the user's"] * 2
