"""SynCoS with CogVideoX-2B in 193 frames, from diffusers and syncos.py alone: copy both files.

The text encoder goes before the transformer comes, and the VAE decodes in tiles, so a GPU of 12 GB
is enough (predicted, see extras/measure/README.md).
"""

import imageio.v2 as imageio
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

from syncos import Settings, diffusion_levels, make_windows, syncos, to_x0

torch.set_grad_enabled(False)
name, dtype, guidance = "zai-org/CogVideoX-2b", torch.float16, 6.0
events = ["A red fox in deep snow. It runs.", "A red fox in deep snow. It jumps."]

# prompts
pipe = CogVideoXPipeline.from_pretrained(name, dtype=dtype, transformer=None, vae=None).to("cuda")
texts = {}
for event in events:
    text, empty = pipe.encode_prompt(event, negative_prompt="")
    texts[event] = torch.cat([empty, text])
del pipe

# the model, its noise levels, and the windows of the long video
pipe = CogVideoXPipeline.from_pretrained(name, dtype=dtype, text_encoder=None).to("cuda")
scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
scheduler.set_timesteps(50)
levels = diffusion_levels(scheduler.alphas_cumprod, scheduler.timesteps.tolist())
level_at = {level.t: level for level in levels}
windows = make_windows(49, 13, stride=4)  # latent frames: 49 are 193 video frames
prompts = [events[i * len(events) // len(windows)] for i in range(len(windows))]


def predict_x0(latents, t, prompts):
    """Guided estimates of the clean windows: latents B f C H W at timestep t, B prompts."""
    estimates = []
    for x, prompt in zip(latents, prompts):
        pair, times = torch.stack([x, x]).to(pipe.dtype), torch.full((2,), t, device=x.device)
        empty, text = pipe.transformer(pair, texts[prompt], times)[0].float()
        estimates.append(to_x0(empty + guidance * (text - empty), x, level_at[t], "v_prediction"))
    return torch.stack(estimates)


# the three stages, in all steps
config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
noise = torch.randn(49, config.in_channels, config.sample_height, config.sample_width, generator=generator)
latents = syncos(predict_x0, noise.to(pipe.device), levels, windows, prompts, Settings(), generator)

# the video
pipe.transformer = None
pipe.vae.enable_tiling()
[video] = pipe.video_processor.postprocess_video(pipe.decode_latents(latents[None].to(pipe.dtype)))
imageio.mimwrite("fox.mp4", (video * 255).astype("uint8"), fps=8)
