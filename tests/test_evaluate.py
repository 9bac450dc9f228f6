"""The measures against transcriptions and known answers, and the whole script on small networks."""

import json
import shutil
import sys
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from helpers import call, make_tokenizer, randn, refusal
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from extras.loading import LFS
from extras.videos import count_frames, wrap, write_tensors
from syncos import make_windows

for package in ("scenedetect", "cv2", "matplotlib"):
    pytest.importorskip(package, reason="the measures need extras/requirements.txt")

from extras.measure import evaluate as E  # noqa: E402

STORY = {"global": "a red fox", "local": ["it runs", "it jumps", "it sleeps"]}
FRAMES = 81  # 21 latents: 3 windows of 13


# --------------------------------------------------------------------------------------------------
# formulas


def test_consistency_is_vbenchs_formula():
    """Written out frame by frame, as VBench defines it; negative similarities count as 0."""
    features = randn(9, 4)
    cosine = lambda a, b: (a @ b / (a.norm() * b.norm())).item()  # noqa: E731
    total = 0.0
    for i in range(1, len(features)):
        to_before, to_first = cosine(features[i], features[i - 1]), cosine(features[i], features[0])
        total += (max(0.0, to_before) + max(0.0, to_first)) / 2
    assert E.consistency(features) == pytest.approx(total / 8, abs=1e-6)


def test_drift_and_fidelity_are_mean_cosines():
    features, text, cosine = randn(6, 5), randn(5, seed=1), torch.nn.CosineSimilarity(dim=0)
    assert len(E.drift(features)) == 5
    for d, value in enumerate(E.drift(features), 1):  # of all pairs d frames apart
        pairs = [cosine(features[i], features[i + d]).item() for i in range(6 - d)]
        assert value == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert E.fidelity(features, text) == pytest.approx(sum(cosine(f, text).item() for f in features) / 6, abs=1e-6)


def test_seams_are_where_windows_begin_and_end():
    joins = E.window_joins(make_windows(21, 13, 4))
    assert joins == [13, 29, 49, 65]  # latents 4 and 8 begin a window; 13 and 17 come after one; latent k: 4k-3 to 4k
    differences = [3.0 if i + 1 in joins else 1.0 for i in range(80)]
    assert E.seam_ratio(differences, joins) == 3
    assert E.seam_ratio([1.0] * 80, joins) == 1 and E.seam_ratio([0.0] * 80, joins) == 1
    assert E.seam_ratio([1.0, 2.0], []) == 1


# --------------------------------------------------------------------------------------------------
# bad input


def refused(capsys, *words) -> str:
    """The line with which `evaluate` refuses these words."""
    with pytest.raises(SystemExit) as stop:
        E.main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_networks_load_completely_or_not_at_all(videos, networks, tmp_path, capsys):
    """Renamed keys would leave random weights; pointers and truncated files hold no weights."""
    words = [videos / "still.mp4", "--story", videos / "story.json", "--device", "cpu"]
    for name in ("dino", "clip"):
        for fault in ("renamed", "pointer", "cut"):
            folder = tmp_path / f"{name}-{fault}"
            shutil.copytree(networks / name, folder)
            file = folder / "model.safetensors"
            if fault == "renamed":
                save_file({f"net.{k}": v for k, v in load_file(file).items()}, file, metadata=dict(format="pt"))
            else:
                file.write_bytes(LFS + b"/spec/v1" if fault == "pointer" else file.read_bytes()[:-100])
            paths = {"dino": networks / "dino", "clip": networks / "clip"} | {name: folder}
            line = refused(capsys, *words, "--dino", paths["dino"], "--clip", paths["clip"], "--no_extras")
            assert (
                str(folder) in line and dict(renamed="missing key", pointer="git lfs", cut="Cannot load")[fault] in line
            )
    torch.save(dict(weight=randn(1, 9), bias=randn(1)), tmp_path / "head.pth")
    load = lambda *args: E.load_aesthetic(*args, clip=str(networks / "clip"))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="mismatched key, first weight"):
        patch.setattr(E, "EXTRAS", {"aesthetic quality": load})
        E.load_extras({"aesthetic quality": str(tmp_path / "head.pth")}, "cpu")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif"])
def test_a_video_cut_short_is_refused(kind, tmp_path):
    options = dict(duration=125) if kind == "gif" else dict(fps=8, macro_block_size=2)
    if kind == "mp4":
        options["output_params"] = ["-movflags", "+faststart"]  # the header comes first and promises all frames
    frames = np.random.default_rng(0).integers(0, 255, (21, 64, 96, 3), np.uint8)
    imageio.mimwrite(path := tmp_path / f"whole.{kind}", frames, **options)
    assert count_frames(path) == 21
    (cut := tmp_path / f"cut.{kind}").write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match=r"cut short after \d+ frames"):
        count_frames(cut)


def test_a_gif_without_delays_has_browsers_rate(tmp_path):
    imageio.mimwrite(tmp_path / "a.gif", randn(5, 16, 16, 3).mul(99).byte().numpy(), duration=0)
    assert E.read_frames(tmp_path / "a.gif")[1] == 10


def test_a_gif_too_fast_for_its_format_is_refused(tmp_path, capsys):
    for fps, fits in ((50, True), (51, False)):
        words = ("--plan", "--fps", fps, "--output_path", tmp_path / "a.gif")
        if fits:
            call(*words)
        else:
            assert "at most 50" in refusal(capsys, *words)


def test_captions_break_where_the_script_does():
    assert wrap("A red fox runs  in\nthe snow.", 10) == ["A red fox", "runs in", "the snow."]
    assert wrap("\u72d0\u72f8\u3002", 5) == ["\u72d0", "\u72f8\u3002"]  # a full stop does not begin a line
    assert wrap("a " + 25 * "b", 10) == ["a", 10 * "b", 10 * "b", 5 * "b"]
    assert wrap(40 * "\u72d0", 12, 2) == [6 * "\u72d0", 4 * "\u72d0" + " ..."] and wrap("", 9) == [""]


@pytest.mark.parametrize("package", ["cv2", "scenedetect", "matplotlib"])
def test_a_missing_package_is_named_before_anything_is_loaded(package, videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(E, "Networks", lambda *_: pytest.fail("loaded"))
    words = [videos / "still.mp4", "--story", videos / "story.json", "--device", "cpu"]
    line = refused(capsys, *(["--trajectories", tmp_path / "a.safetensors"] if package == "matplotlib" else words))
    assert package in line and "extras/requirements.txt" in line


def test_scores_are_json_without_infinity(videos, networks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(E, "seam_ratio", lambda *_: float("inf"))
    evaluate(videos, networks, "still", "--no_extras", "--output_path", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["seam ratio"] is None
    assert "infinite" in capsys.readouterr().out
    monkeypatch.setattr(E, "consistency", lambda *_: float("nan"))
    with pytest.raises(SystemExit) as stop:
        evaluate(videos, networks, "still", "--no_extras", "--output_path", tmp_path / "nan.json")
    assert stop.value.code == 2 and "not finite" in capsys.readouterr().err and not (tmp_path / "nan.json").exists()


# --------------------------------------------------------------------------------------------------
# videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four videos whose ranking is known: a still, a slow drift of colour, a hard cut, noise."""
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
    names = ("still", "drift", "cut", "noise")
    for name in names:
        evaluate(videos, networks, name, "--no_extras", "--batch", "7")
    return {name: json.loads((videos / f"{name}.scores.json").read_text()) for name in names}


def evaluate(videos, networks, name, *words):
    options = ["--story", videos / "story.json", "--dino", networks / "dino", "--clip", networks / "clip"]
    E.main([str(word) for word in (videos / f"{name}.mp4", *options, "--device", "cpu", *words)])


def test_known_videos_come_in_their_order(scores):
    for name in ("subject consistency", "background consistency"):
        still, drifting, cut, noise = (each[name] for each in scores.values())
        assert still > 0.99 and still > drifting > cut and drifting > noise, name
    still, drifting, cut, noise = scores.values()
    assert still["motion"] < drifting["motion"] < cut["motion"] < noise["motion"]
    assert [s["scenes"] for s in (still, drifting, cut)] == [1, 1, 2]
    assert all(s["frames"] == FRAMES and len(s["drift"]) == FRAMES - 1 for s in scores.values())
    a, b = drifting["drift"], cut["drift"]  # they show what the average of neighbours hides
    assert a[0] > 0.99 and a[0] > a[20] > a[-1] and b[0] > b[20] > b[-1] and b[-1] < 0.9


def test_a_cut_at_a_join_is_a_seam(videos):
    watch = E.Watch()
    for frame in E.read_frames(videos / "cut.mp4")[0]:
        watch(frame)
    assert np.argmax(watch.differences) == 29
    assert E.seam_ratio(watch.differences, [30]) > 50 and E.seam_ratio(watch.differences, [20]) < 2


def test_measures_do_not_depend_on_the_batch(videos, networks, scores):
    net = E.Networks(str(networks / "dino"), str(networks / "clip"))
    story = E.P.load_story(videos / "story.json")
    again = E.evaluate(videos / "noise.mp4", story, *E.place_story(videos / "noise.mp4", story, 13, 4), net, batch=64)
    for name in ("subject consistency", "local fidelity", "global fidelity"):
        assert again[name] == pytest.approx(scores["noise"][name], abs=1e-5)


def test_smoothness_is_vbenchs_formula_by_a_line(videos, scores):
    """Every second frame against the mean of its neighbours, in 255ths, from 1 down."""
    frames = np.stack([frame.astype(float) for frame in E.read_frames(videos / "cut.mp4")[0]])
    lost = [np.abs(frames[i] - (frames[i - 1] + frames[i + 1]) / 2).mean() for i in range(1, FRAMES - 1, 2)]
    assert scores["cut"]["linear smoothness"] == pytest.approx((255 - np.mean(lost)) / 255, abs=1e-5)
    still, drifting, _, noise = (scores[name]["linear smoothness"] for name in scores)
    assert still > 0.999 and drifting > 0.99 and noise < 0.8


@pytest.mark.parametrize("speed, moves", [(0, 0), (1, 0), (2, 1)])
def test_dynamic_degree_is_vbenchs_formula(speed, moves):
    """6 pixels of 256 are 1.5 of 64. At 16 frames a second every second frame counts."""
    flow = lambda a, b: torch.tensor([float(speed), 0]).view(2, 1, 1).expand(2, 64, 64)  # noqa: E731
    for fps, batch, pairs in ((8, 17, 16), (8, 5, 16), (16, 4, 8)):
        measure = E.DynamicDegree(flow)
        for frames in randn(17, 3, 64, 64).split(batch):
            measure(frames, fps)
        assert measure.value == moves and len(measure.lengths) == pairs


def test_dynamic_degree_wants_a_quarter_of_the_video_and_sees_small_objects():
    """17 frames: 4 of 16 pairs must move, measured by the fastest 5 % of the pixels."""
    for moving, value in ((3, 0), (4, 1)):
        flows = torch.zeros(16, 2, 64, 64)
        flows[:moving, 0, :4, :52] = 10  # 208 of 4096 pixels; 204 count
        flow = iter(flows)
        measure = E.DynamicDegree(lambda a, b, flow=flow: next(flow))
        measure(randn(17, 3, 64, 64), 8)
        assert measure.value == value


def test_aesthetic_quality_is_the_heads_line_on_normed_features(networks, tmp_path):
    head = dict(weight=randn(1, 24), bias=randn(1))
    torch.save(head, tmp_path / "head.pth")
    measure, frames = E.load_aesthetic(str(tmp_path / "head.pth"), "cpu", str(networks / "clip")), randn(5, 3, 40, 60)
    measure(frames[:2], 8), measure(frames[2:], 8)
    features = E.Networks(str(networks / "dino"), str(networks / "clip")).background(frames)
    each = [(head["weight"][0] @ f / f.norm() + head["bias"][0]).item() for f in features]
    assert measure.value == pytest.approx(sum(each) / 5 / 10, abs=1e-5)


def test_raft_sees_whole_blocks_and_musiq_small_pictures(tmp_path, monkeypatch):
    """With stand-ins for torchvision and pyiqa, which nothing else here needs."""
    seen, weights = [], str(tmp_path / "weights.pth")
    raft, musiq = torch.nn.Identity(), lambda x: seen.append(x.shape) or x.mean((1, 2, 3))
    raft.forward = lambda a, b, num_flow_updates: seen.append(a.shape) or [(b - a)[:, :2]]
    flows = SimpleNamespace(raft_large=lambda weights: raft, Raft_Large_Weights=None)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", flows)
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda *_, **__: musiq))
    torch.save({}, weights)
    frames = torch.zeros(2, 3, 130, 150)
    frames[1] = 0.5
    (flow := E.load_flow(weights, "cpu"))(frames, 8), (imaging := E.load_imaging(None, "cpu"))(frames, 8)
    assert flow.lengths == [pytest.approx(2**0.5)]  # pixels from -1 to 1, so the stand-in's flow is (1, 1)
    imaging(torch.ones(2, 3, 96, 640), 8)
    assert seen == [(1, 3, 136, 152), (2, 3, 130, 150), (2, 3, 77, 512)]
    assert imaging.value == pytest.approx((0 + 0.5 + 1 + 1) / 4 / 100)
    with pytest.raises(ValueError, match="128"):
        E.load_flow(weights, "cpu")(frames[..., :64], 8)


def test_what_is_not_there_is_left_out_with_a_line(videos, networks, tmp_path, monkeypatch, capsys):
    """No library, no weights, frames too small: one line each, and all other measures."""

    def fail(error):
        raise error

    extras = {
        "dynamic degree": lambda *_: E.DynamicDegree(lambda a, b: fail(ValueError("too small."))),
        "aesthetic quality": lambda *_: fail(OSError("no route to host")),
        "imaging quality": lambda *_: fail(ImportError(name="pyiqa")),
    }
    assert list(E.EXTRAS) == list(extras)
    monkeypatch.setattr(E, "EXTRAS", extras)
    evaluate(videos, networks, "cut", "--output_path", tmp_path / "scores.json")
    out = capsys.readouterr().out.splitlines()
    for name, reason in zip(extras, ("too small", "no route to host", "pyiqa")):
        assert [line for line in out if line.startswith(name) and reason in line]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert not set(extras) & set(scores) and scores["motion"] > 0


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
    """Of two methods whose trajectories lie in a plane, projection keeps all distances; their ends
    have mean 0."""
    flat = [randn(5, 7, 2, seed=i).double() for i in range(2)]
    basis = torch.linalg.qr(randn(9, 2, seed=5).double()).Q.T
    planes = E.principal_plane([x @ basis + 3 for x in flat])
    for x, plane in zip(flat, planes):
        assert torch.allclose(torch.cdist(x.flatten(0, 1), x.flatten(0, 1)),
                              torch.cdist(plane.flatten(0, 1), plane.flatten(0, 1)), atol=1e-5)  # fmt: skip
    assert torch.cat([plane[-1] for plane in planes]).mean(0).abs().max() < 1e-6


def test_trajectories_are_drawn(tmp_path, capsys):
    trace = {name: randn(4, 9, 6, seed=i) for i, name in enumerate(("gen-l-video", "stage-2-alone", "syncos"))}
    write_tensors(tmp_path / "trace.safetensors", "trace", trace, dict(num_frames=33))
    E.main(["--trajectories", str(tmp_path / "trace.safetensors")])
    picture = imageio.imread(tmp_path / "trace.png")
    assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 10
    write_tensors(tmp_path / "latents.safetensors", "latents", trace, {})
    with pytest.raises(SystemExit) as stop:
        E.main(["--trajectories", str(tmp_path / "latents.safetensors")])
    assert stop.value.code == 2 and "trace" in capsys.readouterr().err
