"""Stories: parsing, refusals, events over windows, the instruction to a language model."""

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest

import prompts as P
from syncos import make_windows

ROOT = Path(__file__).parents[1]
GOOD = json.dumps({"global": "A cat in a kitchen.", "local": ["It wakes.", "It runs.", "It sleeps."]})


def test_event_prompts_put_global_and_local_together():
    story = P.parse_events(" It wakes. |It runs.", " A cat. ")
    assert story.event_prompts() == ["A cat. It wakes.", "A cat. It runs."]
    assert story.event_prompts(structured=False) == ["It wakes.", "It runs."]
    assert P.parse_events("a|b").event_prompts() == ["a", "b"]


def test_files(tmp_path):
    """A round trip; files with a byte order mark, Windows' line ends, or lines within a prompt; no
    text, no file."""
    path, story = tmp_path / "story.json", P.Story("A café.", ("Ein Bär läuft.", "b"))
    path.write_text(P.to_json(story), encoding="utf-8")
    assert P.load_story(path) == story
    path.write_bytes(b'\xef\xbb\xbf{"global": "A\\nfox.",\r\n "local": ["It  runs."]}\r\n')
    assert P.load_story(path) == P.Story("A fox.", ("It runs.",))
    path.write_text('{"global": "A cat.", "local": ["It wakes\n and runs."]}')  # JSON as models write it
    assert P.load_story(path) == P.Story("A cat.", ("It wakes and runs.",))
    path.write_bytes(b"\xff\xfe\x00")
    for name in ("story.json", "none.json"):
        with pytest.raises(ValueError, match=name):
            P.load_story(tmp_path / name)


@pytest.mark.parametrize("text, keyword", [
    ("not json", "JSON"),
    ("[" * 100_000, "JSON"),
    ('{"global": "a", "local": ["\\ud800"]}', "JSON"),
    ("[1]", "keys"),
    ('{"global": "a"}', "keys"),
    ('{"global": "a", "global": "b", "local": ["c"]}', "keys"),
    ('{"global": 1, "local": ["b"]}', "global"),
    ('{"global": "a", "local": ["b", 2]}', "local"),
    ('{"global": "a", "local": []}', "events"),
    ('{"global": "a", "local": ["b"], "durations": [1, 2]}', "needs a duration"),
    ('{"global": "a", "local": ["b"], "durations": [0]}', "above 0"),
    ('{"global": "a", "local": ["b"], "durations": [NaN]}', "above 0"),
    ('{"global": "a", "local": ["b"], "durations": [1%s]}' % ("0" * 400), "up to 1e6"),
    ('{"global": "a", "local": ["b"], "durations": []}', "needs a duration"),
    ('{"global": "a", "local": ["b"], "durations": [true]}', "list of numbers"),
    ('{"global": "a", "local": ["b"], "durations": ["1"]}', "list of numbers"),
    ('{"global": "a", "local": ["b", "  "]}', "2 of 2"),
    (json.dumps({"global": "a", "local": ["b" * 10_001]}), "10001"),
])  # fmt: skip
def test_other_files_are_refused(text, keyword, tmp_path):
    with pytest.raises(ValueError, match=keyword):
        P.parse_story(text)
    (tmp_path / "story.json").write_text(text)
    with pytest.raises(ValueError, match="story.json"):
        P.load_story(tmp_path / "story.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_a_story_with_a_byte_order_mark(encoding, tmp_path):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "story.json").write_bytes(mark + GOOD.replace("cat", "Käfer").encode(encoding))
    assert P.load_story(tmp_path / "story.json").global_prompt == "A Käfer in a kitchen."


def test_events_follow_window_centres():
    windows = make_windows(49, 13, 4)
    assert P.assign_events(windows, 4) == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]  # at 13, 22, ..., 87 % of the video
    assert P.assign_events(windows, 1) == [0] * 10
    for events in range(1, 11):
        assigned = P.assign_events(windows, events)
        assert assigned == sorted(assigned) and set(assigned) == set(range(events))
    with pytest.raises(ValueError, match="Event . of 11 would get none of 10 windows"):
        P.assign_events(windows, 11)
    assert P.assign_events(make_windows(13, 13, 4), 1) == [0]


def test_durations_are_met_to_the_nearest_window():
    windows = make_windows(49, 13, 4)
    assigned = P.assign_events(windows, 4, (3, 2, 2, 5))
    assert assigned == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    for (_, stop), wanted in zip(P.event_spans(windows, assigned), (3 / 12, 5 / 12, 7 / 12, 1)):
        assert abs(stop - wanted) <= 2 / 49  # half a stride
    assert P.assign_events(windows, 10, (1,) * 10) == P.assign_events(windows, 10)
    assert P.assign_events(windows, 4, (0.3, 0.2, 0.2, 0.5)) == assigned
    with pytest.raises(ValueError, match="Event 1 of 3 would get none"):
        P.assign_events(windows, 3, (1, 10, 1))


def test_a_story_says_how_long_its_events_last():
    story = P.parse_story('{"global": "a", "local": ["b", "c"], "durations": [1, 2.5]}')
    assert story.durations == (1, 2.5) and P.parse_story(P.to_json(story)) == story
    assert "durations" not in P.to_json(P.Story("a", ("b",)))


def test_event_spans_tile_the_video():
    windows = make_windows(49, 13, 4)
    spans = P.event_spans(windows, P.assign_events(windows, 4))
    assert len(spans) == 4 and spans[0][0] == 0 and spans[-1][1] == 1
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert spans[0][1] == pytest.approx(12.5 / 49)  # half-way between the centres 10.5 and 14.5


def test_scenarios_cover_the_papers_kinds():
    assert len([n for n in P.SCENARIOS if not n.startswith("tiny-")]) == 8
    assert all(len(story.local_prompts) == 4 for story in P.SCENARIOS.values())


def test_instruction_is_printed_without_a_model():
    """The program itself, which then needs only the standard library."""
    command = [sys.executable, "-S", ROOT / "prompts.py", "A cat {wakes} up", "--num_prompts", "3"]  # no site-packages
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.strip() == P.instruction("A cat {wakes} up", 3).strip()
    assert "A cat {wakes} up" in text and "3 local prompts" in text and '["...", "...", "..."]' in text
