"""Stories: parsing, refusals, events over windows, and a language model over real HTTP."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import prompts as P
from syncos import make_windows

ROOT = Path(__file__).parent.parent
GOOD = json.dumps({"global": "A cat in a kitchen.", "local": ["It wakes.", "It runs.", "It sleeps."]})


def test_event_prompts_put_global_and_local_together():
    story = P.parse_events(" It wakes. |It runs.", " A cat. ")
    assert story.event_prompts() == ["A cat. It wakes.", "A cat. It runs."]
    assert story.event_prompts(structured=False) == ["It wakes.", "It runs."]
    assert P.parse_events("a|b").event_prompts() == ["a", "b"]


def test_json_round_trip(tmp_path):
    story = P.Story("A café.", ("Ein Bär läuft.", "b"))
    (tmp_path / "story.json").write_text(P.to_json(story), encoding="utf-8")
    assert P.load_story(tmp_path / "story.json") == story


@pytest.mark.parametrize(
    "text, reason",
    [
        ("not json", "not JSON"),
        ("[1]", "object with the keys"),
        ('{"global": "a"}', "object with the keys"),
        ('{"global": "a", "local": ["b"], "style": "c"}', "object with the keys"),
        ('{"global": 1, "local": ["b"]}', "must be a text"),
        ('{"global": "a", "local": "b"}', "list of texts"),
        ('{"global": "a", "local": ["b", 2]}', "list of texts"),
        ('{"global": "a", "local": []}', "no events"),
        ('{"global": "a", "local": ["b", "  "]}', "Event 2 of 2 is empty"),
        ('{"global": "a", "global": "b", "local": ["c"]}', "once each"),
        ('{"global": "a", "local": ["\\ud800"]}', "surrogates"),
        ("[" * 100_000, "recursion"),
        (json.dumps({"global": "a", "local": ["b" * 10_001]}), "10001 characters"),
    ],
)
def test_what_is_no_story_is_refused(text, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        P.parse_story(text)
    (tmp_path / "story.json").write_text(text)
    with pytest.raises(ValueError, match="story.json"):
        P.load_story(tmp_path / "story.json")


def test_what_editors_leave_in_a_file(tmp_path):
    """A byte order mark, the line ends of Windows, lines within a prompt."""
    (tmp_path / "story.json").write_bytes(b'\xef\xbb\xbf{"global": "A\\nfox.",\r\n "local": ["It  runs."]}\r\n')
    assert P.load_story(tmp_path / "story.json") == P.Story("A fox.", ("It runs.",))


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Cannot read"):
        P.load_story(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        P.load_story(tmp_path / "b.json")


def test_events_follow_window_centres():
    windows = make_windows(49, 13, 4)
    assert P.assign_events(windows, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert P.assign_events(windows, 1) == [0] * 10
    for events in range(1, 11):
        assigned = P.assign_events(windows, events)
        assert assigned == sorted(assigned) and set(assigned) == set(range(events))
    with pytest.raises(ValueError, match="11 events do not fit into 10 windows"):
        P.assign_events(windows, 11)
    assert P.assign_events(make_windows(13, 13, 4), 1) == [0]


def test_event_spans_tile_the_video():
    windows = make_windows(49, 13, 4)
    spans = P.event_spans(windows, P.assign_events(windows, 4))
    assert len(spans) == 4 and spans[0][0] == 0 and spans[-1][1] == 1
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert spans[0][1] == pytest.approx(12.5 / 49)  # half-way between the centres 10.5 and 14.5


def test_scenarios_cover_the_papers_kinds():
    assert len([n for n in P.SCENARIOS if not n.startswith("tiny-")]) == 8
    assert all(len(story.local_prompts) == 4 for story in P.SCENARIOS.values())


def test_instruction_holds_scenario_and_count():
    text = P.instruction("A cat {wakes} up", 3)
    assert "A cat {wakes} up" in text and "3 local prompts" in text and '["...", "...", "..."]' in text


class Server:
    """An OpenAI-compatible chat server that gives canned answers and keeps what it was asked."""

    def __init__(self, answers):
        self.answers, self.requests = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body))
                answer = outer.answers.pop(0)
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                message = {"role": "assistant", "content": answer}
                choices = [dict(index=0, finish_reason="stop", message=message)] if answer else []
                reply = dict(id="1", created=0, model=body["model"], object="chat.completion", system_fingerprint="",
                             choices=choices,
                             usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2))  # fmt: skip
                data = answer.encode() if answer.startswith("<html>") else json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def ask(answers, tmp_path, *extra):
    server = Server(answers)
    command = [sys.executable, ROOT / "prompts.py", "A cat's day", "--num_prompts", "3", "--llm", "some-model"]
    command += ["--base_url", server.url, "--output", tmp_path / "story.json", *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    server.server.shutdown()
    return done, server.requests


def test_llm_writes_the_story_that_demo_reads(tmp_path):
    done, requests = ask([f"Here you are:\n```json\n{GOOD}\n```"], tmp_path)
    assert done.returncode == 0, done.stderr
    (path, body), *rest = requests
    assert path == "/v1/chat/completions" and body["model"] == "some-model" and not rest
    assert "A cat's day" in body["messages"][0]["content"]
    assert P.load_story(tmp_path / "story.json") == P.parse_story(GOOD)


def test_llm_is_asked_once_more_with_what_was_wrong(tmp_path):
    done, requests = ask(['{"global": "A cat.", "local": ["one"]}', GOOD], tmp_path)
    assert done.returncode == 0, done.stderr
    messages = requests[1][1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert "1 local prompts where 3" in messages[2]["content"]


@pytest.mark.parametrize(
    "answers, reason",
    [
        (["no", "still no"], "not JSON"),
        (["no", '{"global": "", "local": ["a", "b", "c"]}'], "global prompt is empty"),
        ([404], "did not answer"),
        ([""], "did not answer: what came holds no choices"),
        (["<html>Log in</html>"], "what came is no JSON; is --base_url an OpenAI-compatible server"),
    ],
)
def test_llm_that_fails_leaves_no_file(answers, reason, tmp_path):
    done, _ = ask(answers, tmp_path)
    assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_story_is_not_overwritten(tmp_path):
    (tmp_path / "story.json").write_text("mine")
    done, requests = ask([GOOD], tmp_path)
    assert done.returncode == 2 and "exists already" in done.stderr and not requests
    assert (tmp_path / "story.json").read_text() == "mine"


def test_instruction_is_printed_without_a_model():
    done = subprocess.run(
        [sys.executable, ROOT / "prompts.py", "A cat", "--num_prompts", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == P.instruction("A cat", 2).strip()
