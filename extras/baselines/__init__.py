"""The paper's baselines, one per file; here, what every method gets and gives."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

import prompts as P
from backbones import Backbone, Recipe
from syncos import Level, share_noise

METHOD_OPTIONS = ("stride", "window_batch", "t_min", "csd_iters", "csd_lr", "csd_batch")  # not of every method
Callback = Callable[[int, float, Tensor, Tensor], None]  # see `Method.sample`


@dataclass(frozen=True)
class Plan:
    """A long video to sample, the same for every method. Raises ValueError if it does not fit."""

    recipe: Recipe
    texts: tuple[str, ...]  # the whole prompt of each event, in time order
    durations: tuple[float, ...] | None = None  # of the events, relative to one another

    def __post_init__(self):
        self.events, self.levels  # noqa: B018, they raise

    @cached_property
    def windows(self) -> list[slice]:
        """Windows at the recipe's stride. A method may use others."""
        return self.recipe.windows()

    @cached_property
    def events(self) -> list[int]:
        """The event of each window."""
        return P.assign_events(self.windows, len(self.texts), self.durations)

    def noise(self, generator: torch.Generator) -> Tensor:
        """The initial noise, F x C x H x W, from which all methods start."""
        noise = torch.randn(self.recipe.latent_frames, *self.recipe.latent, generator=generator)
        return share_noise(noise, self.windows, generator) if self.recipe.settings.shared_noise else noise

    @cached_property
    def levels(self) -> list[Level]:
        r = self.recipe
        try:
            return r.backbone.make_levels(r.scheduler, r.num_inference_steps)
        except Exception as error:  # whatever a scheduler's file can hold
            raise ValueError(f"{r.model}: its scheduler cannot be used: {error}") from error

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each event, as shares of the video."""
        return P.event_spans(self.windows, self.events)


class Method(Protocol):
    """A way to sample a plan: a frozen dataclass of its settings. See `extras.methods.METHODS`."""

    options: Collection[str]  # those of METHOD_OPTIONS that act on it

    def check(self, plan: Plan) -> None:
        """Raises ValueError if the method cannot sample this backbone or length."""

    def steps(self, plan: Plan) -> int:
        """Number of steps of a run, as its callback counts them."""

    def evaluations(self, plan: Plan, steps: int) -> int:
        """Number of windows that the model evaluates in the first `steps` steps."""

    def spans(self, plan: Plan) -> list[tuple[float, float]]:
        """Start and end of each event in this method's video, 0 to 1."""

    def describe(self, plan: Plan) -> str:
        """What is special about a run, for the printed plan; may be empty."""

    def sample(
        self,
        backbone: Backbone,
        plan: Plan,
        latents: Tensor,
        generator: torch.Generator,
        callback: Callback | None = None,
        done: Callable[[int], None] = lambda n: None,
        start: int = 0,
        x0: Tensor | None = None,
    ) -> Tensor:
        """Sample the clean latents, F x C x H x W, from the initial noise of that shape.

        backbone: loaded, its texts encoded, its levels made. callback(step, t, x0, latents) is
        called after every step with its estimate and its result (in shapes of the method's own). A
        stopped run resumes, bit for bit, from what its last call got, `start` = the number of steps
        done, and the generator in the state that it then had. done(n) is called after every n
        windows that the model evaluated.
        """
