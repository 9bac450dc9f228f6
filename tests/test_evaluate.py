"""The measures: against direct transcriptions, on videos with known answers, and the whole script on small networks."""

import json

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

import evaluate as E
from syncos import make_windows
from videos import write_tensors

STORY = {"global": "a red fox", "local": ["it runs", "it jumps", "it sleeps"]}
FRAMES = 81  # 21 latents: 3 windows of 13


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# formulas


def test_consistency_is_vbenchs_formula():
    """Written out frame by frame, as VBench defines it; some similarities are negative and count as 0."""
    features = randn(9, 4)
    cosine = lambda a, b: (a @ b / (a.norm() * b.norm())).item()  # noqa: E731
    total = 0.0
    for i in range(1, len(features)):
        to_before, to_first = cosine(features[i], features[i - 1]), cosine(features[i], features[0])
        total += (max(0.0, to_before) + max(0.0, to_first)) / 2
    assert E.consistency(features) == pytest.approx(total / 8, abs=1e-6)


def test_drift_is_the_mean_over_pairs():
    features = randn(6, 5)
    for d, value in enumerate(E.drift(features), 1):
        pairs = [torch.cosine_similarity(features[i], features[i + d], dim=0).item() for i in range(6 - d)]
        assert value == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert len(E.drift(features)) == 5


def test_fidelity_is_a_mean_cosine():
    features, text = randn(7, 5), randn(5, seed=1)
    each = [torch.cosine_similarity(f, text, dim=0).item() for f in features]
    assert E.fidelity(features, text) == pytest.approx(sum(each) / 7, abs=1e-6)


def test_seams_are_where_windows_begin_and_end():
    joins = E.window_joins(make_windows(21, 13, 4))
    assert joins == [13, 29, 49, 65]  # latents 4 and 8 begin a window; 13 and 17 come after one; latent k: 4k-3 to 4k
    differences = [3.0 if i + 1 in joins else 1.0 for i in range(80)]
    assert E.seam_ratio(differences, joins) == 3
    assert E.seam_ratio([1.0] * 80, joins) == 1 and E.seam_ratio([0.0] * 80, joins) == 1
    assert E.seam_ratio([1.0, 2.0], []) == 1


# ----------------------------------------------------------------------------------------------------------------------
# videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos whose order is known: a still, a slow drift of colour, a hard cut, white noise."""
    folder, random = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    a, b = (np.kron(random.integers(0, 255, (4, 6, 3)), np.ones((16, 16, 1))) for _ in range(2))
    mix = lambda share: a + (b - a) * share  # noqa: E731
    films = {
        "still": [a] * FRAMES,
        "drift": [mix(0.4 * i / (FRAMES - 1)) for i in range(FRAMES)],
        "cut": [mix(float(i >= 30)) for i in range(FRAMES)],
        "noise": list(random.integers(0, 255, (FRAMES, 64, 96, 3))),
    }
    for name, frames in films.items():
        imageio.mimwrite(folder / f"{name}.mp4", np.array(frames, np.uint8), fps=8, quality=10, macro_block_size=2)
    (folder / "story.json").write_text(json.dumps(STORY))
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a DINO and a CLIP with random weights; pictures of 32 pixels."""
    folder, size = tmp_path_factory.mktemp("networks"), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    ViTModel(ViTConfig(**size, intermediate_size=64, image_size=32, patch_size=8, initializer_range=0.2),
             add_pooling_layer=False).save_pretrained(folder / "dino")  # fmt: skip
    vision = dict(**size, intermediate_size=64, image_size=32, patch_size=8, initializer_range=0.2)
    text = dict(**size, intermediate_size=64, vocab_size=16, max_position_embeddings=12, eos_token_id=1)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder / "clip")
    make_tokenizer().save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def scores(videos, networks):
    options = ["--story", str(videos / "story.json"), "--dino", str(networks / "dino"), "--device", "cpu"]
    for name in ("still", "drift", "cut", "noise"):
        E.main([str(videos / f"{name}.mp4"), *options, "--clip", str(networks / "clip"), "--batch", "7"])
    return {
        name: json.loads((videos / f"{name}.scores.json").read_text()) for name in ("still", "drift", "cut", "noise")
    }


def test_known_videos_come_in_their_order(scores):
    for measure in ("subject consistency", "background consistency"):
        still, drifting, cut, noise = (scores[name][measure] for name in scores)
        assert still > 0.99 and still > drifting > cut and drifting > noise, measure
    still, drifting, cut, noise = (scores[name] for name in scores)
    assert still["motion"] < drifting["motion"] < cut["motion"] < noise["motion"]
    assert [s["scenes"] for s in (still, drifting, cut)] == [1, 1, 2]
    assert all(s["frames"] == FRAMES and len(s["drift"]) == FRAMES - 1 for s in scores.values())


def test_drift_shows_what_the_average_of_neighbours_hides(scores):
    curve = scores["drift"]["drift"]
    assert curve[0] > 0.99 and curve[0] > curve[20] > curve[-1]
    cut = scores["cut"]["drift"]
    assert cut[0] > cut[20] > cut[-1] and cut[-1] < 0.9


def test_a_cut_at_a_join_is_a_seam(videos):
    frames, _ = E.read_frames(videos / "cut.mp4")
    watch = E.Watch()
    for frame in frames:
        watch(frame)
    assert np.argmax(watch.differences) == 29
    assert E.seam_ratio(watch.differences, [30]) > 50 and E.seam_ratio(watch.differences, [20]) < 2


def test_measures_do_not_depend_on_the_batch(videos, networks, scores):
    net = E.Networks(str(networks / "dino"), str(networks / "clip"))
    story = E.P.load_story(videos / "story.json")
    again = E.evaluate(videos / "noise.mp4", story, *E.place_story(videos / "noise.mp4", story, 13, 4), net, batch=64)
    for name in ("subject consistency", "local fidelity", "global fidelity"):
        assert again[name] == pytest.approx(scores["noise"][name], abs=1e-5)


def test_pictures_reach_the_networks_whole_and_upright(networks):
    """The shorter side becomes the network's; CLIP sees the square in the middle."""
    x = torch.zeros(1, 3, 64, 128)
    x[..., 32:96] = 1
    assert E.shorter_side(x, 32, "bilinear").shape == (1, 3, 32, 64)
    assert E.shorter_side(x.mT, 32, "bicubic").shape == (1, 3, 64, 32)
    net = E.Networks(str(networks / "dino"), str(networks / "clip"))
    assert torch.allclose(net.background(x), net.background(torch.ones(1, 3, 32, 32)), atol=0.05)
    assert not torch.allclose(net.subject(x), net.subject(torch.ones(1, 3, 64, 128)), atol=0.5)


def test_the_plane_shows_distances_as_they_are():
    """Two methods whose trajectories lie in a plane: projected, all distances are the same; the ends have mean 0."""
    flat = [randn(5, 7, 2, seed=i).double() for i in range(2)]
    basis = torch.linalg.qr(randn(9, 2, seed=5).double()).Q.T
    planes = E.principal_plane([x @ basis + 3 for x in flat])
    for x, plane in zip(flat, planes):
        assert torch.allclose(torch.cdist(x.flatten(0, 1), x.flatten(0, 1)),
                              torch.cdist(plane.flatten(0, 1), plane.flatten(0, 1)), atol=1e-5)  # fmt: skip
    assert torch.cat([plane[-1] for plane in planes]).mean(0).abs().max() < 1e-6


def test_trajectories_are_drawn(tmp_path, capsys):
    trace = {name: randn(4, 9, 6, seed=i) for i, name in enumerate(("gen-l-video", "csd", "syncos"))}
    write_tensors(tmp_path / "trace.safetensors", "trace", trace, dict(num_frames=33))
    E.main(["--trajectories", str(tmp_path / "trace.safetensors")])
    picture = imageio.imread(tmp_path / "trace.png")
    assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 10
    write_tensors(tmp_path / "latents.safetensors", "latents", trace, {})
    with pytest.raises(SystemExit) as stop:
        E.main(["--trajectories", str(tmp_path / "latents.safetensors")])
    assert stop.value.code == 2 and "holds no trace" in capsys.readouterr().err
