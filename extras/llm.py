"""A story from a language model, by the instruction of prompts.py (the paper used GPT-4o).

python -m extras.llm "A cat wakes up, hunts a fly and falls asleep again" --llm MODEL
    asks a model on the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN
python -m extras.llm "..." --llm MODEL --base_url URL --num_prompts 3 --output story.json
    asks an OpenAI-compatible server, with OPENAI_API_KEY if that is set
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from extras.errors import causes
from prompts import Story, instruction, parse_args, parse_story, to_json

HUB = "https://router.huggingface.co/v1"


def find_story(answer: str, count: int) -> Story:
    """Find the story in a model's answer: the last object with a story's keys.

    Raises ValueError stating what is wrong with the answer.
    """
    answer = answer.rpartition("</think>")[2].strip()
    if not answer:
        raise ValueError("The answer is empty.")
    start = answer.find("{")
    found, decoder = answer[start:] if start >= 0 else answer, json.JSONDecoder(strict=False)  # raw line breaks
    for i, letter in enumerate(answer):
        if letter == "{":
            try:
                data, stop = decoder.raw_decode(answer, i)
            except (json.JSONDecodeError, RecursionError):
                continue
            if {"global", "local"} <= data.keys():
                found = answer[i:stop]
    story = parse_story(found)
    if len(story.local_prompts) != count:
        raise ValueError(f"The story has {len(story.local_prompts)} local prompts where {count} were asked for.")
    if not story.global_prompt:
        raise ValueError("The global prompt is empty.")
    return story


def ask(chat: Callable[[list[dict]], str], scenario: str, count: int) -> Story:
    """Have `chat(messages) -> answer` split the scenario. After a bad answer, show it, state the
    error and ask once more.

    Raises ValueError if the second answer is bad too.
    """
    messages = [{"role": "user", "content": instruction(scenario, count)}]
    for attempt in range(2):
        answer = chat(messages)
        try:
            return find_story(answer, count)
        except ValueError as error:
            show(answer)
            if attempt == 1:
                raise ValueError(f"Neither of the model's two answers is a story: {error}") from None
            complaint = f"That answer cannot be used: {error} Answer again, with the JSON alone."
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]


def show(answer: str) -> None:
    print(conceal(f"The model answered:\n{answer}\n"), file=sys.stderr)


def llm_chat(model: str, url: str, key: str | None, timeout: float) -> Callable[[list[dict]], str]:
    """Make `chat` for `ask`. InferenceClient would send the hub's token to any server, and keeps
    what a server says of a failure to itself; hence a plain request.

    `chat` raises ConnectionError with the server's own message if there is no answer, and
    ValueError if the answer is incomplete.
    """
    import requests

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {key}"  # not sent on to another host by a redirect
        return request

    def chat(messages: list[dict]) -> str:
        body = dict(model=model, messages=messages)
        try:
            response = requests.post(url, json=body, auth=sign if key else None, timeout=timeout)
        except requests.Timeout:
            raise ConnectionError(f"no answer within {timeout:g} seconds; --timeout SECONDS waits longer.") from None
        try:
            data = response.json()
        except ValueError:
            data = None
        if not response.ok:
            said = sentence(data) or ("" if "<" in response.text else response.text.strip()[:500])
            raise ConnectionError(": ".join(filter(None, [f"{response.status_code} {response.reason}", said])))
        if data is None:
            raise ConnectionError("its response is not JSON; is --base_url an OpenAI-compatible server?")
        return read_answer(data)

    return chat


def read_answer(data: Any) -> str:
    """The text in a server's response. Raises ConnectionError if it holds none, ValueError if the
    text is incomplete."""
    try:
        choice = data["choices"][0]
        message, end = choice["message"], choice.get("finish_reason")
        parts = [message.get(name) for name in ("content", "reasoning_content", "reasoning")]
    except (LookupError, TypeError, AttributeError):
        raise ConnectionError(sentence(data) or "its response has no choices.") from None
    if said := sentence(message.get("refusal")) or sentence(choice.get("error")):
        raise ConnectionError(said)
    texts = ["".join(p.get("text") or "" for p in x) if isinstance(x, list) else x or "" for x in parts]
    answer = next(filter(str.strip, texts), "")  # some models answer in their reasoning alone
    if end in ("length", "content_filter") or (not answer and end not in (None, "stop")):
        if answer:
            show(answer)
        why = "was cut off; ask for fewer events, or another model" if end == "length" else f"ended with {end}"
        raise ValueError(f"The model's answer {why}.")
    return answer


def sentence(data: Any) -> str:
    """What a server's JSON says of a failure, in whichever of the usual forms."""
    if isinstance(data, dict):
        data = [data.get(key) for key in ("error", "errors", "message", "detail", "msg", "error_description", "code")]
    if isinstance(data, list):
        return next(filter(None, map(sentence, data)), "")
    return " ".join(data.split()) if isinstance(data, str) else ""


def conceal(text: str, url: str = "") -> str:
    """The text without keys, whoever put them there."""
    from huggingface_hub import get_token

    secrets = [os.environ.get("OPENAI_API_KEY"), get_token(), urlsplit(url).password]
    secrets += [value for values in parse_qs(urlsplit(url).query).values() for value in values]
    for secret in secrets:
        if secret and len(secret.strip()) >= 6:
            text = text.replace(secret.strip(), "***")
    return re.sub(r"\b(sk-|hf_)[\w-]{6,}", r"\1***", text)


def choose_server(base_url: str | None) -> tuple[str, str | None]:
    """Address of the chat, and the key: the hub's for the hub alone. Raises ValueError."""
    from huggingface_hub import get_token

    name, key = ("OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY")) if base_url else ("HF_TOKEN", get_token())
    key = (key or "").strip() or None
    if not (base_url or key):
        raise ValueError("The hub's models need a token: run `hf auth login`, or set HF_TOKEN.")
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError(f"{name} holds characters that no key has; set it again.")
    try:
        parts = urlsplit((base_url or HUB).strip())
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError("--base_url must be like http://localhost:8000/v1, with http:// or https://.") from None
    path = (parts.path.rstrip("/") or "/v1").removesuffix("/chat/completions")
    return parts._replace(path=f"{path}/chat/completions").geturl(), key


def root(error: BaseException) -> str:
    """What first went wrong, without the addresses that may hold a key."""
    error = causes(error)[-1]
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rpartition(">: ")[2]


def main(argv: list[str] | None = None) -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("extras.llm", description=__doc__, formatter_class=kind)
    parser.add_argument("--llm", metavar="MODEL", required=True, help="the model to ask")
    parser.add_argument("--base_url", metavar="URL", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for an answer (default: 300)")
    parser.add_argument("--output", type=Path, default=Path("story.json"), help="file to write (default: story.json)")
    args = parse_args(parser, argv)
    from extras import videos as V

    V.open_streams()
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} already exists; choose another file with --output.")
        V.check_output(args.output, (args.output.suffix.lower(),))
        if not 1 <= args.timeout <= 86400:
            raise ValueError(f"--timeout must be a number of seconds from 1 to 86400, got {args.timeout:g}.")
        url, key = choose_server(args.base_url)
    except OSError as error:
        parser.error(f"{args.output} cannot be written: {error.strerror}.")
    except ValueError as error:
        parser.error(str(error))

    try:
        story = to_json(ask(llm_chat(args.llm, url, key, args.timeout), args.scenario, args.num_prompts))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except ValueError as error:
        sys.exit(conceal(f"extras.llm: {error}", url))
    except Exception as error:  # any failure of network or server
        sys.exit(conceal(f"extras.llm: {args.llm} gave no usable answer: {root(error)}", url))
    V.say(story)
    try:
        if args.output.exists():
            raise FileExistsError(f"{args.output} has appeared meanwhile.")
        with V.replacing(args.output) as partial:
            partial.write_text(story, encoding="utf-8")
    except OSError as error:
        sys.exit(f"extras.llm: {error} The story stands above; save it in a file.")
    V.say(f"Wrote {args.output}. Next: python demo.py --story {args.output}")


if __name__ == "__main__":
    main()
