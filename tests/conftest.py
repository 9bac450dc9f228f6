"""Tiny CogVideoX pipelines with random weights, sincos (like 2B) and rotary (like 5B): 16x32 pixels, 5 latents."""

import os

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

torch.set_num_threads(1)  # the tensors are tiny; more threads only get in each other's way,
os.environ["OMP_NUM_THREADS"] = "1"  # also in programs that tests start


def pytest_collection_modifyitems(items):
    """The longest first, so that no process waits for it in the end."""
    items.sort(key=lambda item: item.name not in ("test_runs_from_a_clean_kernel", "test_torchrun"))


WORDS = "a red fox it runs jumps sleeps and looks around .".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_pipeline(rotary: bool) -> CogVideoXPipeline:
    torch.manual_seed(0)
    pipe = CogVideoXPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=64,  # tiles are half of this: 4 x 4 latents
            sample_width=64,
            scaling_factor=0.7,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            sample_width=4,
            sample_height=2,
            sample_frames=17,
            max_text_seq_length=12,
            use_rotary_positional_embeddings=rotary,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=3.0,
        ),
    )
    for model in (pipe.transformer, pipe.text_encoder):
        for p in model.parameters():  # no parameter at its default: biases and gates count too
            torch.nn.init.normal_(p, std=0.15)
    return pipe.to("cpu")


def save_pipeline(kind: str, tmp_path_factory) -> str:
    """A folder as CogVideoXPipeline.save_pretrained writes it."""
    folder = tmp_path_factory.mktemp(kind)
    make_pipeline(rotary=kind == "rotary").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=["sincos", "rotary"])
def pipeline_folder(request, tmp_path_factory):
    return save_pipeline(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def sincos_folder(tmp_path_factory):
    """For the program, to which both are alike."""
    return save_pipeline("sincos", tmp_path_factory)


@pytest.fixture
def base(sincos_folder, tmp_path):
    """Words that make a small run of the random pipeline: 33 frames, 9 latent frames, 3 windows."""
    words = f"--backbone cogvideox --model {sincos_folder} --device cpu --num_frames 33 --num_inference_steps 4"
    words += f" --stride 2 --csd_iters 2 --t_min 300 --output_path {tmp_path / 'video.mp4'}"
    return [*words.split(), "--prompt", "it runs | it jumps", "--global_prompt", "a red fox ."]
