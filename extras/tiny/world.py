"""The tiny world: 64x64 clips of one object doing one thing in one place, captioned in plain words.

    shape x colour x background x action = 4 x 5 x 4 x 5 = 400 stories, each in endless variations
    of position, size, speed and phase. `render` draws them, `caption` describes them, `Fitter`
    reads what any clip shows by fitting the same renderer to it. Needs only torch.

Coordinates: x to the right, y down, as shares of the frame's side; sizes are multiples of RADIUS.
"""

import functools

import torch

SIZE, FRAMES, RADIUS, GROUND = 64, 49, 0.22, 0.92  # pixels per side; frames per clip; object radius; y of its feet
SHAPES = ["ball", "box", "triangle", "star"]
COLORS = {
    "red": (0.90, 0.16, 0.14),
    "yellow": (1.00, 0.85, 0.15),
    "green": (0.10, 0.62, 0.25),
    "blue": (0.15, 0.35, 0.95),
    "pink": (1.00, 0.50, 0.78),
}
BACKGROUNDS = {"meadow": "in a meadow", "desert": "in the desert", "night": "at night", "snow": "in the snow"}
ACTIONS = {
    "right": "It moves right.",
    "left": "It moves left.",
    "jump": "It jumps.",
    "grow": "It grows.",
    "shrink": "It shrinks.",
}
WIDEST = 1.26  # half the width of the widest shape, the star, in radii
INK = torch.tensor([0.10, 0.08, 0.12])  # the outline
PALETTE = torch.tensor(list(COLORS.values()))
GRID = (torch.arange(SIZE) + 0.5) / SIZE


def sample_stories(n: int, generator: torch.Generator) -> torch.Tensor:
    """n random stories: long tensor (n, 4) of indices into SHAPES, COLORS, BACKGROUNDS, ACTIONS."""
    counts = (len(SHAPES), len(COLORS), len(BACKGROUNDS), len(ACTIONS))
    return torch.stack([torch.randint(c, (n,), generator=generator) for c in counts], 1)


def caption(story, color: bool = True, background: bool = True, subject: bool = True) -> str:
    """A story in words: "A red ball in the desert. It jumps."; the model chooses what is open."""
    shape, col, place, action = (int(i) for i in story)
    noun = f"A {list(COLORS)[col]} {SHAPES[shape]}" if color else f"A {SHAPES[shape]}"
    where = f" {list(BACKGROUNDS.values())[place]}" if background else ""
    act = list(ACTIONS.values())[action]
    return f"{noun}{where}. {act}" if subject else act


def vocabulary() -> list[str]:
    """Every word (and mark) that a caption can hold, in order of first use."""
    words = ["a", ".", *COLORS, *SHAPES]
    for phrase in [*BACKGROUNDS.values(), *ACTIONS.values()]:
        words += phrase.lower().replace(".", " .").split()
    return list(dict.fromkeys(words))


def backgrounds() -> torch.Tensor:
    """Paint the four places: (4, 3, SIZE, SIZE) in [0, 1]."""
    y, x = GRID[:, None].expand(SIZE, SIZE), GRID[None, :].expand(SIZE, SIZE)
    rgb = lambda *c: torch.tensor(c)[:, None, None]  # noqa: E731
    edge = lambda d: (d * SIZE + 0.5).clamp(0, 1)  # anti-aliased coverage of the side where d > 0  # noqa: E731

    def paint(sky_top, sky_low, *layers):
        image = rgb(*sky_top) + (rgb(*sky_low) - rgb(*sky_top)) * y
        for coverage, color in layers:
            image = image + (rgb(*color) - image) * edge(coverage)
        return image

    def disc(cx, cy, r):
        return r - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()

    hill = lambda base, height, freq, phase: y - base + height * torch.sin(freq * x + phase)  # noqa: E731
    peak = lambda cx, top, slope: y - top - slope * (x - cx).abs()  # noqa: E731
    stars = [(disc(cx, cy, 0.012), (1.0, 1.0, 0.9)) for cx, cy in [(0.12, 0.2), (0.3, 0.08), (0.45, 0.3), (0.62, 0.12)]]
    return torch.stack(
        [
            paint(
                (0.45, 0.75, 1.0),
                (0.80, 0.93, 1.0),
                (disc(0.15, 0.16, 0.09), (1.0, 0.95, 0.60)),
                (hill(0.62, 0.06, 6.0, 0.5), (0.55, 0.80, 0.45)),
                (hill(0.72, 0.02, 5.0, 2.0), (0.65, 0.87, 0.42)),
            ),
            paint(
                (0.98, 0.72, 0.48),
                (1.0, 0.90, 0.70),
                (disc(0.80, 0.22, 0.12), (1.0, 0.97, 0.85)),
                (hill(0.60, 0.08, 5.0, 3.5), (0.85, 0.62, 0.38)),
                (hill(0.72, 0.02, 4.0, 1.0), (0.94, 0.77, 0.50)),
            ),
            paint(
                (0.04, 0.04, 0.20),
                (0.16, 0.14, 0.42),
                *stars,
                (disc(0.82, 0.18, 0.10), (0.97, 0.95, 0.80)),
                (hill(0.66, 0.05, 5.0, 5.0), (0.10, 0.16, 0.28)),
                (hill(0.74, 0.02, 4.0, 0.0), (0.14, 0.24, 0.32)),
            ),
            paint(
                (0.62, 0.70, 0.80),
                (0.80, 0.85, 0.92),
                (peak(0.28, 0.30, 1.1), (0.50, 0.58, 0.70)),
                (peak(0.74, 0.40, 1.0), (0.58, 0.65, 0.76)),
                (hill(0.70, 0.02, 5.0, 1.0), (0.96, 0.97, 1.0)),
            ),
        ]
    )


def sample_motion(stories: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random object motion for stories (n, 4): its centre x, y and its size, (n, FRAMES, 3).

    Position, size, speed and phase are random. A movement may begin late or end early, so a clip
    can start or stop mid-action, and one clip can begin where another ends.
    """
    n, t = len(stories), torch.arange(FRAMES)
    draw = lambda lo, hi: lo + (hi - lo) * torch.rand(n, 1, generator=generator)  # noqa: E731
    action = [stories[:, 3:] == i for i in range(len(ACTIONS))]

    # progress of the movement from 0 to 1, with a rest before or after in some clips
    before, after = (draw(-20, 18).clamp(min=0) for _ in range(2))
    progress = ((t - before) / (FRAMES - 1 - before - after)).clamp(0, 1)

    # the size changes by a visible amount, or stays constant
    s_low = draw(0.65, 0.90)
    s_high = (s_low + draw(0.35, 0.60)).clamp(max=1.35)
    s = torch.where(action[2], draw(0.70, 0.95), draw(0.65, 1.35)).expand(n, FRAMES)
    s = torch.where(action[3], s_low + (s_high - s_low) * progress, s)
    s = torch.where(action[4], s_high + (s_low - s_high) * progress, s)

    # so does x, within the range that keeps the whole object at its largest in the frame
    edge = WIDEST * RADIUS * s.amax(1, keepdim=True)
    way = draw(0.24, 0.56).minimum(1 - 2 * edge) * (action[0] | action[1])
    x_low = edge + (1 - 2 * edge - way) * draw(0, 1)
    x = x_low + way * torch.where(action[1], 1 - progress, progress)

    # a small object jumps: one hop per clip, starting at any phase
    hop = draw(0.24, 0.30) * torch.sin(torch.pi * (t / (FRAMES - 1) + draw(0, 1))).square()
    y = GROUND - RADIUS * s - torch.where(action[2], hop, torch.zeros(()))
    return torch.stack([x, y, s], -1)


def signed_distance(shape: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance from the outline of a shape of radius 1 at the origin, negative inside (y down)."""
    if SHAPES[shape] == "ball":
        return (x * x + y * y).sqrt() - 1.0
    if SHAPES[shape] == "box":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if SHAPES[shape] == "triangle":  # feet at y = 1, apex at y = -1.2
        return torch.maximum(y - 1.0, (x.abs() * 1.80 - y - 1.20) / 2.06)
    angle = torch.atan2(x, -y)  # a star: five half-planes folded onto one point's edge
    fold = (angle + torch.pi / 5).remainder(2 * torch.pi / 5) - torch.pi / 5
    r = (x * x + y * y).sqrt()
    px, py = r * torch.sin(fold).abs(), r * torch.cos(fold)
    tip, inner = 1.32, 0.62  # outer and inner radius
    ix, iy = inner * 0.5878, inner * 0.8090  # the inner corner, at 36 degrees
    nx, ny = tip - iy, ix  # normal of the edge tip -> inner corner
    return (px * nx + (py - tip) * ny) / (nx * nx + ny * ny) ** 0.5


def masks(shape: int, motion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage in [0, 1] of fill and outline for motion (..., 3): (..., SIZE, SIZE) each."""
    x, y, s = motion[..., None, None].unbind(-3)
    radius = RADIUS * s
    d = signed_distance(shape, (GRID - x) / radius, (GRID[:, None] - y) / radius) * radius * SIZE  # pixels
    outer, inner = (0.5 - d).clamp(0, 1), (0.5 - (d + 1.6)).clamp(0, 1)
    return inner, outer - inner


def render(stories: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Draw: stories (n, 4), motion (n, T, 3) -> video (n, T, 3, SIZE, SIZE) in [0, 1]."""
    places, out = backgrounds(), []
    for (shape, color, place, _), m in zip(stories.tolist(), motion):
        fill, line = (mask[:, None] for mask in masks(shape, m))  # T 1 H W
        out.append(places[place] * (1 - fill - line) + PALETTE[color][:, None, None] * fill + INK[:, None, None] * line)
    return torch.stack(out)


def color_within(video: torch.Tensor, story: tuple, motion: torch.Tensor) -> list[float]:
    """The object's own red, green and blue, whatever the palette has: the median of what a fitted
    object fills. video: (T, 3, SIZE, SIZE); story, motion: as from `Fitter`. Only the half of the
    frames counts whose surroundings fit best: in others the place is another, and the fit wrong."""
    fill, line = masks(story[0], motion)  # T H W each
    around = ((video - backgrounds()[story[2]]).square().mean(1) * (fill + line == 0)).mean((1, 2))
    best = around.argsort()[: (len(video) + 1) // 2]
    return video[best].movedim(1, -1)[fill[best] == 1].median(0).values.tolist()


class Fitter:
    """Reads a clip by fitting the renderer to it: its story, and the object's motion.

    Searches a grid of positions and sizes at half resolution: |g - T|^2 is smallest where 2 <g, T>
    - |T|^2 is largest, with g = frame - background and T = (color - background) fill + (ink -
    background) line.
    """

    def __init__(self):
        x, s, hop = torch.meshgrid(
            torch.linspace(0.20, 0.80, 22), torch.linspace(0.60, 1.40, 10), torch.linspace(0, 0.30, 9), indexing="ij"
        )
        self.grid = torch.stack([x, GROUND - RADIUS * s - hop, s], -1).view(-1, 3)  # G 3
        self.places = self.half(backgrounds())  # 4 3 P
        fills, lines = zip(*(masks(shape, self.grid) for shape in range(len(SHAPES))))  # G H W each
        self.fill, self.line = (self.half(torch.stack(m)) for m in (fills, lines))  # 4 G P

    @staticmethod
    def half(images: torch.Tensor) -> torch.Tensor:
        """... H W -> ... (H/2 W/2)"""
        return images.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).mean((-3, -1)).flatten(-2)

    def adds(self, place: int, color: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What fill and line add to the background pixels that they cover: 3 P each."""
        return PALETTE[color][:, None] - self.places[place], INK[:, None] - self.places[place]

    @functools.cache  # noqa: B019
    def norm(self, place: int, color: int, shape: int) -> torch.Tensor:
        """|T|^2 for the whole grid: G."""
        f, n = self.fill[shape], self.line[shape]  # G P
        fill, line = self.adds(place, color)
        return f**2 @ (fill**2).sum(0) + n**2 @ (line**2).sum(0) + 2 * (f * n) @ (fill * line).sum(0)

    def __call__(self, video: torch.Tensor) -> tuple[tuple[int, int, int, int], torch.Tensor]:
        """Video (T, 3, SIZE, SIZE) in [0, 1] -> its story (see sample_stories; action -1: none) and
        motion (T, 3)."""
        frames = self.half(video)  # T 3 P
        place = (frames[None] - self.places[:, None]).abs().clamp(max=0.3).mean((1, 2, 3)).argmin().item()
        g, best = frames - self.places[place], None
        for color in range(len(PALETTE)):
            g_fill, g_line = ((g * add).sum(1) for add in self.adds(place, color))  # T P each
            for shape in range(len(SHAPES)):
                overlap = g_fill @ self.fill[shape].T + g_line @ self.line[shape].T  # T G
                gain, where = (2 * overlap - self.norm(place, color, shape)).max(1)  # T
                if best is None or gain.sum() > best[0]:
                    best = gain.sum(), shape, color, self.grid[where]
        _, shape, color, motion = best
        return (shape, color, place, self.action(motion)), motion

    @staticmethod
    def refine(video: torch.Tensor, story: tuple[int, int, int, int], motion: torch.Tensor) -> torch.Tensor:
        """Refine the grid's motion (T, 3) until its picture is nearest to the video at full
        resolution, by a Levenberg-Marquardt search per frame."""
        draw = lambda motion: render(torch.tensor([story]), motion[None])[0].flatten(1)  # T P  # noqa: E731
        target, picture, damping = video.flatten(1), draw(motion), torch.full((len(motion), 1, 1), 0.1)
        for _ in range(8):
            error = target - picture
            slopes = torch.stack([draw(motion + d) - picture for d in 0.008 * torch.eye(3)], 1)  # T 3 P; half a pixel
            normal = slopes @ slopes.mT  # T 3 3
            normal = normal + damping * normal.diagonal(dim1=1, dim2=2).diag_embed() + 1e-6 * torch.eye(3)
            tried = motion + 0.008 * torch.linalg.solve(normal, (slopes @ error[..., None])[..., 0])
            other = draw(tried)
            better = (target - other).square().sum(1) < error.square().sum(1)
            motion = torch.where(better[:, None], tried, motion)
            picture = torch.where(better[:, None], other, picture)
            damping = damping * torch.where(better, 0.3, 5.0)[:, None, None]
        return motion

    @staticmethod
    def action(motion: torch.Tensor) -> int:
        """Action that a motion (T, 3) shows most clearly; -1 if none changes enough."""
        x, y, s = motion.unbind(-1)
        third = max(1, len(motion) // 3)
        dx, ds = (v[-third:].mean() - v[:third].mean() for v in (x, s))
        hop = (y + RADIUS * s).std()
        scores = torch.stack([dx, -dx, hop, ds, -ds]) / torch.tensor([0.16, 0.16, 0.06, 0.22, 0.22])
        return scores.argmax().item() if scores.max() > 0.4 else -1
