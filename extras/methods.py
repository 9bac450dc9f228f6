"""The methods that one can choose. A new one is a class in a file of its own and a line here."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from extras.baselines import Method, Plan
from extras.baselines.csd import CSD
from extras.baselines.ditctrl import DiTCtrl
from extras.baselines.fifo import Fifo
from extras.baselines.video_infinity import VideoInfinity
from extras.processes import in_batches
from syncos import GEN_L_VIDEO, STAGE_2_ALONE, Settings, count_evaluations, refined_steps, syncos_step

AT_ONCE = 24  # windows that `in_batches` gets, to cut them up and share them


@dataclass(frozen=True)
class SynCoS:
    """SynCoS, its ablations, and what else its stages give. See `extras.baselines.Method`."""

    settings: Settings

    @property
    def options(self) -> set[str]:
        s, always = self.settings, {"stride", "window_batch"}
        coupled = {"csd_iters", "csd_lr", "csd_batch"} if s.refine else set()
        limited = {"t_min"} if s.t_min >= 0 and (s.refine or s.noise != "implied") else set()  # -1: every step
        return always | coupled | limited

    def check(self, plan: Plan) -> None:
        if not self.evaluations(plan, self.steps(plan)):
            never = "Without stage 1, and with no step for stage 2, the model is never asked"
            raise ValueError(f"{never}; lower --t_min or take more steps.")

    def steps(self, plan: Plan) -> int:
        return len(plan.levels) - 1

    def evaluations(self, plan: Plan, steps: int) -> int:
        return count_evaluations(plan.levels[: steps + 1], plan.windows, self.settings)

    def spans(self, plan: Plan) -> list[tuple[float, float]]:
        return plan.spans

    def describe(self, plan: Plan) -> str:
        s, levels = self.settings, plan.levels
        if not (refined := refined_steps(levels, s)):
            return f"stage 2 never runs: no timestep is above t_min = {s.t_min:g}" if s.refine else ""
        last = levels[refined[-1]]
        noise = ", noise shared by all windows" if s.shared_noise else ""
        return (
            f"stage 2 above t = {s.t_min:g}, in {len(refined)} steps, down to alpha/sigma = "
            f"{last.alpha / last.sigma:.2g}: {s.csd_iters} iterations of "
            f"{min(s.csd_batch, len(plan.windows))} windows, learning rate {s.csd_lr:g}{noise}"
        )

    def sample(self, backbone, plan, latents, generator, callback=None, done=lambda n: None, start=0, x0=None):
        predict_x0 = in_batches(backbone.predict_x0, plan.recipe.window_batch, done)
        prompts, x = [plan.texts[event] for event in plan.events], latents.float()
        rest = (plan.levels, plan.windows, prompts, self.settings, generator, AT_ONCE)
        x0 = x if x0 is None else x0
        for step in range(start, self.steps(plan)):
            x0, x = syncos_step(predict_x0, x, x0, step, *rest)
            if callback:
                callback(step, plan.levels[step].t, x0, x)
        return x


METHODS: dict[str, Callable[[Settings], Method]] = {  # from the settings that the user chose
    "syncos": SynCoS,
    "gen-l-video": lambda settings: SynCoS(replace(settings, **GEN_L_VIDEO)),
    "stage-2-alone": lambda settings: SynCoS(replace(settings, **STAGE_2_ALONE)),
    "fifo": lambda settings: Fifo(),
    "ditctrl": lambda settings: DiTCtrl(),
    "ditctrl-sde": lambda settings: DiTCtrl(sde=True),
    "csd": lambda settings: CSD(batch=settings.csd_batch),
    "video-infinity": lambda settings: VideoInfinity(),
}
