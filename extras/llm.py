"""A story from a language model, by the instruction of prompts.py (the paper used GPT-4o).

python -m extras.llm "A cat wakes up, hunts a fly and falls asleep again" --llm MODEL
    asks a model on the Hugging Face hub
python -m extras.llm "..." --llm MODEL --base_url URL --num_prompts 3 --output story.json
    asks an OpenAI-compatible server
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from prompts import Story, instruction, parse_args, parse_story, to_json


def find_story(answer: str, count: int) -> Story:
    """Find the story in a model's answer: the last object with a story's keys.

    Raises ValueError stating what is wrong with the answer.
    """
    answer = answer.rpartition("</think>")[2].strip()
    if not answer:
        raise ValueError("The answer is empty.")
    start = answer.find("{")
    found, decoder = answer[start:] if start >= 0 else answer, json.JSONDecoder()
    for i, letter in enumerate(answer):
        if letter == "{":
            try:
                data, stop = decoder.raw_decode(answer, i)
            except (json.JSONDecodeError, RecursionError):
                continue
            if {"global", "local"} <= data.keys():
                found = answer[i:stop]
    return parse_story(found, count)


def ask(chat: Callable[[list[dict]], str], scenario: str, count: int) -> Story:
    """Have `chat(messages) -> answer` split the scenario. After a bad answer,
    state the error and ask once more.

    Raises ValueError if the second answer is bad too.
    """
    messages = [{"role": "user", "content": instruction(scenario, count)}]
    for attempt in range(2):
        answer = chat(messages)
        try:
            return find_story(answer, count)
        except ValueError as error:
            if attempt == 1:
                raise ValueError(f"Neither of the model's two answers is a story: {error}") from None
            complaint = f"That answer cannot be used: {error} Answer again, with the JSON alone."
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]


def llm_chat(model: str, base_url: str | None) -> Callable[[list[dict]], str]:
    """Make `chat` for `ask`: a model on the hub (key: HF_TOKEN), or on an
    OpenAI-compatible server (OPENAI_API_KEY)."""
    from huggingface_hub import InferenceClient

    key = os.environ.get("OPENAI_API_KEY") if base_url else None
    client = InferenceClient(base_url=base_url, api_key=key, timeout=120)

    def chat(messages: list[dict]) -> str:
        try:
            choices = client.chat_completion(messages, model=model, max_tokens=4000).choices
        except json.JSONDecodeError:
            raise ConnectionError("its response is not JSON; is --base_url an OpenAI-compatible server?") from None
        if not choices:
            raise ConnectionError("its response has no choices.")
        content = choices[0].message.content or ""
        if not isinstance(content, str):  # in parts
            content = "".join(part.get("text") or "" for part in content)
        if choices[0].finish_reason == "length":
            raise ValueError("The model's answer was cut off at 4000 tokens; ask for fewer events, or another model.")
        return content

    return chat


def main(argv: list[str] | None = None) -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("extras.llm", description=__doc__, formatter_class=kind)
    parser.add_argument("--llm", metavar="MODEL", required=True, help="the model to ask")
    parser.add_argument("--base_url", metavar="URL", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--output", type=Path, default=Path("story.json"), help="file to write (default: story.json)")
    args = parse_args(parser, argv)
    try:
        if args.output.exists():
            parser.error(f"{args.output} already exists; choose another file with --output.")
        if not args.output.absolute().parent.is_dir():
            parser.error(f"The folder of {args.output} does not exist; create it first.")
    except OSError as error:
        parser.error(f"{args.output} cannot be written: {error.strerror}.")
    if args.base_url and not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base_url must begin with http:// or https://, got {args.base_url}.")

    try:
        story = ask(llm_chat(args.llm, args.base_url), args.scenario, args.num_prompts)
        args.output.write_text(to_json(story), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"extras.llm: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except Exception as error:  # any failure of network or server
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sys.exit(f"extras.llm: {args.llm} gave no usable answer: {reason}")
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")  # a console may lack letters
    print(to_json(story) + f"Wrote {args.output}. Next: python demo.py --story {args.output}")


if __name__ == "__main__":
    main()
