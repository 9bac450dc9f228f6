"""A language model over real HTTP: its answers, its failures, and keys, which go to their own
server only and are never shown."""

import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import prompts as P
from extras import llm
from extras import videos as V

GOOD = json.dumps({"global": "A cat in a kitchen.", "local": ["It wakes.", "It runs.", "It sleeps."]})
OPENAI, HF = "sk-private-1234", "hf_private5678"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token" / "none"))


def reply(content, end="stop", **fields) -> dict:
    message = dict(role="assistant", content=content, **fields)
    return dict(id="1", object="chat.completion", choices=[dict(index=0, finish_reason=end, message=message)])


def ask(answers, tmp_path, *more, base_url=True) -> list:
    """Run the program with a server that answers so: a text, a whole response, bytes, a status, or
    a status with a response. Returns the requests that it got: path, headers, body."""
    answers, requests = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append((self.path, self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            answer = answers.pop(0)
            status, answer = answer if isinstance(answer, tuple) else (200, answer)
            if callable(answer):
                answer = answer(self)
            if isinstance(answer, int):
                return self.send_error(answer)
            answer = reply(answer) if isinstance(answer, str) else answer
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        words = ["A cat's day", "--num_prompts", "3", "--llm", "some-model", "--output", str(tmp_path / "story.json")]
        try:
            llm.main([*words, *(["--base_url", url] if base_url is True else []), *more])
        finally:
            server.shutdown()
    return requests


def test_it_writes_the_story_that_demo_reads(tmp_path, capsys):
    [(path, headers, body)] = ask([f"Here you are:\n```json\n{GOOD}\n```"], tmp_path)
    assert path == "/v1/chat/completions" and body["model"] == "some-model"
    assert "A cat's day" in body["messages"][0]["content"]
    assert P.load_story(tmp_path / "story.json") == P.parse_story(GOOD)
    assert "Next: python demo.py --story" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [
    f'<think>Form: {{"global": "...", "local": ["..."]}} {{hm}}</think>{GOOD}',
    f'{{"global": "x", "local": ["y"]}} was my draft. Better:\n{GOOD}\nDo you like {{it}}?',
    f'{{"story": {GOOD}}}',
    reply([dict(type="text", text=GOOD[:20]), dict(type="text", text=GOOD[20:])]),
    f"I wrote:\n{GOOD.replace('a kitchen', 'a' + chr(10) + 'kitchen')}",
    reply("", reasoning_content=f"So: {GOOD}"),
    reply(None, reasoning=f"So: {GOOD}"),
    reply(GOOD, end="eos_token"),
])  # fmt: skip
def test_a_story_is_found_whatever_stands_around_it(answer, tmp_path):
    ask([answer], tmp_path)
    assert P.load_story(tmp_path / "story.json") == P.parse_story(GOOD)


def test_it_is_asked_once_more_with_what_was_wrong(tmp_path, capsys):
    _, (_, _, body) = ask(['{"global": "A cat.", "local": ["one"]}', GOOD], tmp_path)
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert "1 local prompts where 3" in body["messages"][2]["content"]
    assert P.load_story(tmp_path / "story.json") == P.parse_story(GOOD)
    assert '"local": ["one"]' in capsys.readouterr().err  # nothing that a model said is lost


@pytest.mark.parametrize("answers, keyword", [
    (["no", "still no"], "JSON"),
    (["no", '{"global": "", "local": ["a", "b", "c"]}'], "global"),
    ([404], "404 Not Found"),
    ([(401, dict(error=dict(message="Your key is unknown.", code="bad_key")))], "401 Unauthorized: Your key is"),
    ([(429, dict(error="Slow\n down."))], "429 Too Many Requests: Slow down."),
    ([(400, [dict(error=dict(message="No such\nmodel."))])], "No such model."),
    ([(422, dict(detail=[dict(loc=["body"], msg="Field required")]))], "Field required"),
    ([(503, b"overloaded, come back")], "503 .*overloaded, come back"),
    ([dict(error=dict(message="The model is asleep."))], "The model is asleep."),
    ([dict(choices=[], detail="Not today.")], "Not today."),
    ([dict(choices=[])], "choices"),
    ([dict(choices=[dict(finish_reason="error", error=dict(message="Lost it."), message=dict(content=""))])], "Lost"),
    ([[1, 2]], "choices"),
    ([b"<html>Log in</html>"], "--base_url"),
    ([" ", "<think>{}</think>"], "empty"),
    ([reply(GOOD[:50], "length")], "cut off"),
    ([reply("", "content_filter")], "content_filter"),
    ([reply("", "tool_calls")], "tool_calls"),
    ([reply(None, refusal="I cannot write that.")], "I cannot write that."),
    (["no", 500], "500"),
])  # fmt: skip
def test_failures_say_why_and_leave_no_file(answers, keyword, tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"^extras.llm: .*{keyword}"):  # one sentence, status 1
        ask(answers, tmp_path)
    assert not list(tmp_path.iterdir())
    if answers[0] in ("no", reply(GOOD[:50], "length")):
        assert "The model answered" in capsys.readouterr().err


@pytest.mark.parametrize("key, sent", [("", None), (f" {OPENAI}\n", f"Bearer {OPENAI}")])
@pytest.mark.parametrize("stored", ["variable", "file"])
def test_the_hubs_token_goes_to_the_hub_alone(key, sent, stored, tmp_path, monkeypatch):
    if stored == "variable":
        monkeypatch.setenv("HF_TOKEN", HF)
    else:  # as `hf auth login` leaves it
        (tmp_path / "token").write_text(HF)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    [(_, headers, _)] = ask([GOOD], tmp_path)
    assert headers["Authorization"] == sent and HF not in str(headers)
    assert llm.choose_server(None) == ("https://router.huggingface.co/v1/chat/completions", HF)


@pytest.mark.parametrize("echo", [
    lambda r: 500,
    lambda r: dict(error=f"Bad request with {r.headers['Authorization']}, {HF} and sk-somebody-elses-9"),
    lambda r: reply(f"You are {r.headers['Authorization']}", "length"),
    lambda r: f"You are {r.headers['Authorization']}",
])  # fmt: skip
def test_keys_are_never_printed(echo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI)
    monkeypatch.setenv("HF_TOKEN", HF)
    with pytest.raises(SystemExit) as end:
        ask([(200, echo), (200, echo)], tmp_path)
    said = f"{end.value} {capsys.readouterr()}"
    assert not any(key in said for key in (OPENAI, HF, "somebody"))


@pytest.mark.parametrize("words, keyword", [
    (["--base_url", "localhost:8000"], "http://"),
    (["--base_url", "http://[::1"], "http://"),
    (["--base_url", "https:///v1"], "http://"),
    ([], "hf auth login"),
    (["--timeout", "nan", "--base_url", "http://h"], "--timeout"),
    (["--timeout", "0", "--base_url", "http://h"], "--timeout"),
    (["--output", "no/story.json", "--base_url", "http://h"], "folder"),
    (["--output", "story.json/story.json", "--base_url", "http://h"], "folder|written"),
    (["--output", ".", "--base_url", "http://h"], "exists"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_asking(words, keyword, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ask([], tmp_path, *words, base_url=False)
    assert end.value.code == 2 and re.search(keyword, capsys.readouterr().err.splitlines()[-1])


def test_a_key_that_no_header_can_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-pri\nvate\u00e9")
    with pytest.raises(SystemExit):
        ask([], tmp_path)
    said = capsys.readouterr().err
    assert "OPENAI_API_KEY holds" in said and "vate" not in said


def test_a_server_that_is_away_or_slow(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="gave no usable answer: Connection refused"):
        ask([], tmp_path, "--base_url", "http://me:secret@127.0.0.1:9/v1?api-key=mysecret", base_url=False)
    start = time.monotonic()
    with pytest.raises(SystemExit, match="within 1 seconds; --timeout"):
        ask([(200, lambda _: time.sleep(1.5) or GOOD)], tmp_path, "--timeout", "1")
    assert time.monotonic() - start < 10 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("base, path", [
    ("http://h", "http://h/v1/chat/completions"),
    ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
    ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ("https://h/openai?api-version=1", "https://h/openai/chat/completions?api-version=1"),
])  # fmt: skip
def test_base_urls(base, path):
    assert llm.choose_server(base) == (path, None)


def test_an_answer_that_cannot_be_written_is_shown(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(V.os, "replace", full)
    with pytest.raises(SystemExit, match="No space left"):
        ask([GOOD], tmp_path)
    assert P.parse_story(capsys.readouterr().out) == P.parse_story(GOOD) and not list(tmp_path.iterdir())


def test_a_story_of_others_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "story.json").write_text("mine")
    with pytest.raises(SystemExit) as end:
        ask([], tmp_path)
    assert end.value.code == 2 and "exists" in capsys.readouterr().err
    (tmp_path / "story.json").unlink()
    with pytest.raises(SystemExit, match="appeared"):
        ask([(200, lambda _: (tmp_path / "story.json").write_text("mine") and GOOD)], tmp_path)
    assert (tmp_path / "story.json").read_text() == "mine"
    assert P.parse_story(capsys.readouterr().out) == P.parse_story(GOOD)
