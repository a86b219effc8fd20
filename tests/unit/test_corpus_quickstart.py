"""The quickstart's text: documents that do not repeat each other, written once."""

import json

from tests.assets import make_corpus, prose_topics


def records(folder):
    return [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.open("rb")]


def test_no_topic_lies_whole_inside_another():
    topics = prose_topics()
    assert len(topics) > 40
    assert "while" in topics
    assert "compound" not in topics  # it repeats `while` and others whole
    for name, text in topics.items():
        body = text.partition("***\n")[2].strip() or text.strip()
        assert not [other for other in topics if other != name and body in topics[other]]


def test_the_corpus_is_bounded_and_written_once(tmp_path):
    folder = make_corpus(tmp_path, max_chars=20_000)
    found = records(folder)
    assert 10_000 < sum(len(record["text"]) for record in found) <= 20_000
    assert {record["text"] for record in found} <= set(prose_topics().values())
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(times) == ["part-0.jsonl", "part-1.jsonl"]
    make_corpus(tmp_path, max_chars=20_000)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert len(records(make_corpus(tmp_path))) > len(found)
