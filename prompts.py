"""Structured prompts: a global prompt for what stays, a local one per event for what changes.

    python prompts.py "A cat wakes up, hunts a fly and falls asleep again" --num_prompts 3
        prints the instruction for any chat model (the paper used GPT-4o); save its answer as JSON
    python demo.py --story story.json

`python -m extras.llm` asks a model and writes that file. Needs only the standard library.
"""

from __future__ import annotations  # for Python 3.8 to 3.10

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

LONGEST = 10_000  # characters per prompt


@dataclass(frozen=True)
class Story:
    """A structured prompt: one local prompt per event, in order, and how long each event lasts,
    relative to the others (None: equally long). Raises ValueError if empty or wrong."""

    global_prompt: str
    local_prompts: tuple[str, ...]
    durations: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.local_prompts:
            raise ValueError("The story has no events; give at least one local prompt.")
        for i, text in enumerate(self.local_prompts, 1):
            if not text.strip():
                raise ValueError(f"Event {i} of {len(self.local_prompts)} is empty; every event needs a local prompt.")
        if (longest := max(map(len, (self.global_prompt, *self.local_prompts)))) > LONGEST:
            raise ValueError(f"A prompt has {longest} characters; no model reads more than {LONGEST}.")
        given, events = self.durations, len(self.local_prompts)
        if given is not None and not (len(given) == events and all(0 < x <= 1e6 for x in given)):
            raise ValueError(f"Each of {events} events needs a duration above 0 and up to 1e6, not {[*given]}.")

    def event_prompts(self, structured: bool = True) -> list[str]:
        """Text of each event: global and local prompt, or the local one alone (ablation)."""
        parts = [[self.global_prompt, text] if structured else [text] for text in self.local_prompts]
        return [" ".join(part.strip() for part in pair if part.strip()) for pair in parts]


def parse_events(text: str, global_prompt: str = "") -> Story:
    """A story from one line, events separated by `|`."""
    return Story(global_prompt.strip(), tuple(event.strip() for event in text.split("|")))


def parse_story(text: str) -> Story:
    """A story from JSON. Raises ValueError."""
    form = 'expected {"global": "...", "local": ["...", ...]}, with or without "durations": [1, ...]'
    try:
        once = lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else None  # noqa: E731
        data = json.loads(text, object_pairs_hook=once, strict=False)  # as models write: line breaks in strings
        json.dumps(data, ensure_ascii=False).encode()
    except (json.JSONDecodeError, RecursionError, UnicodeEncodeError) as error:
        raise ValueError(f"This is not JSON ({error}); {form}.") from None
    if not isinstance(data, dict) or set(data) - {"durations"} != {"global", "local"}:
        raise ValueError(f'A story is an object with just the keys "global" and "local", once each; {form}.')
    local, durations = data["local"], data.get("durations")
    if not isinstance(data["global"], str) or not isinstance(local, list) or not all(isinstance(p, str) for p in local):
        raise ValueError(f'"global" must be a string and "local" a list of strings; {form}.')
    if durations is not None and not (isinstance(durations, list) and all(type(x) in (int, float) for x in durations)):
        raise ValueError(f'"durations" must be a list of numbers; {form}.')
    texts = " ".join(data["global"].split()), tuple(" ".join(p.split()) for p in local)
    return Story(*texts, durations and tuple(durations))


def load_story(path: str | Path) -> Story:
    """A story from a JSON file in UTF-8, or UTF-16 with a byte order mark. Raises ValueError."""
    try:
        data = Path(path).read_bytes()
        return parse_story(data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the story {path}: {getattr(error, 'strerror', 'not a text file')}.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_json(story: Story) -> str:
    """JSON that `parse_story` reads."""
    data = {"global": story.global_prompt, "local": story.local_prompts, "durations": story.durations}
    return json.dumps({k: v for k, v in data.items() if v is not None}, indent=2, ensure_ascii=False) + "\n"


def assign_events(windows: Sequence[slice], events: int, durations: Sequence[float] | None = None) -> list[int]:
    """Event of each window: the one that is on at its centre if events share the video by their
    durations, equal by default. If one of equal events gets no window that way, they share the
    range of centres instead. [ours] Raises ValueError if an event still gets none."""
    shares = durations or [1] * events
    stops = [stop / sum(shares) for stop in accumulate(shares)][:-1]
    centres = [(w.start + w.stop) / 2 / windows[-1].stop for w in windows]
    step = (centres[-1] - centres[0]) / max(len(windows) - 1, 1) or 1.0
    inner = [(c - centres[0] + step / 2) / (centres[-1] - centres[0] + step) for c in centres]
    for places in [centres] if len(set(shares)) > 1 else [centres, inner]:
        assigned = [bisect_right(stops, round(place, 9)) for place in places]
        if not (missing := set(range(events)) - set(assigned)):
            return assigned
    hint = "use fewer events, more frames, less stride or a longer event"
    raise ValueError(f"Event {min(missing) + 1} of {events} would get none of {len(windows)} windows; {hint}.")


def event_spans(windows: Sequence[slice], assigned: Sequence[int]) -> list[tuple[float, float]]:
    """Start and end of each event, 0 to 1. Two meet half-way between the centres of windows."""
    centres = [(w.start + w.stop) / 2 for w in windows]
    cuts = [(a + b) / 2 for a, b, i, j in zip(centres, centres[1:], assigned, assigned[1:]) if i != j]
    edges = [0.0, *(c / windows[-1].stop for c in cuts), 1.0]
    return list(zip(edges, edges[1:]))


# --------------------------------------------------------------------------------------------------
# Ready-made stories: one of each kind in the paper, and some for the tiny world

SCENARIOS = {  # global prompt, then one local prompt per event
    "corgi": (  # object motion control
        "A fluffy corgi with a red bandana on a sandy beach at golden hour, gentle waves behind it, film photography.",
        "The corgi trots along the waterline.",
        "The corgi leaps over a piece of driftwood.",
        "The corgi digs in the wet sand with its front paws.",
        "The corgi shakes the water off its coat.",
    ),
    "lighthouse": (  # camera control
        "A white lighthouse on a rocky green headland above a calm blue sea, clear morning light, aerial footage.",
        "The camera rises slowly from the rocks.",
        "The camera circles the lighthouse to the right.",
        "The camera moves in on the lantern room.",
        "The camera pulls back until the whole coast is seen.",
    ),
    "cyclist": (  # background change
        "A cyclist in a yellow jersey rides a silver road bike, seen from the side, smooth tracking shot.",
        "She rides through a field of sunflowers.",
        "She rides along a lake below snowy mountains.",
        "She rides across a long bridge in the fog.",
        "She rides into a city of glass towers at dusk.",
    ),
    "iceberg": (  # physical transformation
        "A single blue iceberg in a still dark fjord under a pale sky, fixed camera, high detail.",
        "The iceberg stands tall and sharp.",
        "Water runs down its sides as it begins to melt.",
        "A large piece breaks off and slides into the water.",
        "Only a small round block of ice still floats.",
    ),
    "baker": (  # storytelling
        "An old baker with a white moustache and a flour-dusted apron in a small warm bakery lit by the oven.",
        "He kneads dough on a wooden table.",
        "He shapes the dough into round loaves.",
        "He pushes the loaves into the glowing oven.",
        "He lifts a golden loaf and smiles at it.",
    ),
    "tea": (  # compositional generation
        "A wooden table by a sunlit window, seen from slightly above, watercolour style.",
        "An empty blue cup stands on the table.",
        "A blue cup stands on the table beside a yellow teapot.",
        "A blue cup, a yellow teapot and a plate of biscuits stand on the table.",
        "A blue cup, a yellow teapot, a plate of biscuits and a sleeping cat share the table.",
    ),
    "train": (  # cinematic effect
        "A black steam train crosses a stone viaduct in a wooded valley, cinematic wide shot, 35 mm film.",
        "The train moves in soft morning mist.",
        "Sunbeams break through the steam as the train goes by.",
        "The train goes by in slow motion while leaves whirl around it.",
        "The picture fades to the blue of evening as the train's lamps light up.",
    ),
    "astronaut": (  # complex scene transition
        "An astronaut in a white suit with an orange visor walks forward, seen from behind, photorealistic.",
        "The astronaut walks down the corridor of a space station.",
        "The astronaut walks out of a hatch onto a red desert planet.",
        "The astronaut walks through a storm of red dust.",
        "The astronaut walks into a forest of glowing plants.",
    ),
    # the tiny world (extras/tiny/world.py): a place or colour left open is the model's to keep
    "tiny-star": ("A red star.", "It grows.", "It moves right.", "It shrinks.", "It moves left."),
    "tiny-ball": ("A ball.", "It grows.", "It moves right.", "It jumps.", "It shrinks."),
    "tiny-box": ("A box.", "It jumps.", "It moves left.", "It shrinks.", "It moves right."),
    "tiny-night": ("A triangle at night.", "It moves left.", "It grows.", "It jumps.", "It moves right."),
}
SCENARIOS = {name: Story(first, tuple(rest)) for name, (first, *rest) in SCENARIOS.items()}


# --------------------------------------------------------------------------------------------------
# The instruction to a language model (the paper's Fig. 8, in our words)

INSTRUCTION = """\
Split the scenario below into a structured prompt for a text-to-video model that makes one long video of {count} events.

Write one global prompt and {count} local prompts:
- The global prompt says everything that stays the same from the first frame to the last: the subject and its looks, the
  place, the style, the light, the camera. One or two sentences.
- Each local prompt says what happens in one event, in time order. Put the action first; one short sentence each.
- The local prompts must differ in what happens, and follow each other without a jump.
- What two or more events share belongs in the global prompt. Name the subject in the same words everywhere.
- Say what can be seen: no thoughts, no sounds, no reasons. If the scenario changes the place or the light on purpose,
  say so in the local prompts and leave it out of the global one.

Answer with JSON alone, in this form:
{{"global": "...", "local": [{dots}]}}

Scenario: {scenario}
"""


def instruction(scenario: str, count: int) -> str:
    """Text that asks a language model for a global prompt and `count` local ones."""
    return INSTRUCTION.format(scenario=scenario.strip(), count=count, dots=", ".join(['"..."'] * count))


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Scenario and number of events, besides what the parser has."""
    parser.add_argument("scenario", help="what happens in the video, in your own words")
    parser.add_argument("--num_prompts", type=int, default=4, help="events, one local prompt each (default: 4)")
    args = parser.parse_args(argv)
    if not args.scenario.strip():
        parser.error("The scenario is empty; say in a sentence or two what happens.")
    if args.num_prompts < 1:
        parser.error(f"--num_prompts must be at least 1, got {args.num_prompts}.")
    return args


if __name__ == "__main__":
    ARGS = parse_args(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")  # a console may lack letters
    print(instruction(ARGS.scenario, ARGS.num_prompts))
