"""The Hugging Face hub, played by a local server: its failures in one line, bars while it sends."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from diffusers import AutoencoderKL
from helpers import refusal
from huggingface_hub import close_session, constants, hf_hub_download
from huggingface_hub.utils import are_progress_bars_disabled

from extras import loading
from extras.models.checked import from_hub

ANSWERS = {  # path of a model -> status, what the hub's headers say
    "no/model": (404, "RepoNotFound", "Repository not found"),
    "gated/model": (403, "GatedRepo", "Access to gated/model is restricted"),
    "bad/token": (401, None, "Invalid credentials in Authorization header"),
    "weak/token": (403, None, "This token may not read"),
    "half/model": (404, "EntryNotFound", "Entry not found"),
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        status, code, message = ANSWERS.get("/".join(self.path.split("/")[1:3]), (200, None, ""))
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message}.items():
            if value:
                self.send_header(name, value)
        for name, value in {"ETag": '"1"', "X-Repo-Commit": "0" * 40, "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"ok")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Make an address the hub's, by default that of a local server."""

    def at(endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        at(f"http://127.0.0.1:{server.server_port}")
        yield at
        server.shutdown()


@pytest.mark.parametrize("backbone", ["cogvideox", "wan", "opensora-plan", "videocrafter2"])
@pytest.mark.parametrize("model, words", [
    ("no/model", ["Repository not found", "Check the name"]),
    ("gated/model", ["Access to gated/model is restricted", "terms"]),
    ("bad/token", ["Invalid credentials", "401", "hf auth login"]),
    ("weak/token", ["This token may not read", "403"]),
])  # fmt: skip
def test_the_hubs_own_words(backbone, model, words, hub, capsys):
    said = refusal(capsys, "--backbone", backbone, "--model", model, "--device", "cpu")
    assert all(word in said for word in words) and len(said.splitlines()[-1]) < 300


@pytest.mark.parametrize("endpoint, reason", [
    ("http://127.0.0.1:9", "Connection refused"),  # no network, or a proxy that is away
    ("127.0.0.1:9/hub", "https://"),
])  # fmt: skip
def test_a_hub_out_of_reach(endpoint, reason, hub, capsys):
    hub(endpoint)
    said = refusal(capsys, "--backbone", "cogvideox", "--model", "a/b", "--device", "cpu")
    assert f"{endpoint} cannot be reached" in said and reason in said and "HF_ENDPOINT" in said


def test_offline_by_choice(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"), from_hub("a/b"):
        hf_hub_download("a/b", "config.json")
    close_session()


def test_other_errors_stay_what_they_are(hub, capsys):
    assert "config.json" in refusal(capsys, "--backbone", "opensora-plan", "--model", "half/model", "--device", "cpu")
    with pytest.raises(KeyError, match="x"), from_hub("a/b"):
        raise KeyError("x")
    with pytest.raises(ValueError, match="Cannot load gated/model: Access to .*terms"):
        loading.load_network(AutoencoderKL, "gated/model", "", None)


def test_downloads_show_their_progress(hub, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # as on a terminal
    assert not are_progress_bars_disabled()
    assert open(hf_hub_download("good/model", "weights.bin")).read() == "ok"
    assert "weights.bin: 100%" in capsys.readouterr().err
