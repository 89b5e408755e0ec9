"""Control signals: each against a reference, batched against single, from saved weights, as columns of data sets."""

import io
import pickle

import cv2
import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import draw
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch.nn import functional as F

from cm3leon_hf import processing_prompts
from cm3leon_hf.data import controls_drawing
from cm3leon_hf.data.controls import CONTROLS, HED, OCR, Canny, Depth, Normal, Pose, Scribble, Segmentation, annotated

NORMALIZED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def scene(width: int, height: int, seed: int) -> Image.Image:
    """Filled shapes in random places, so that every network sees something else in every picture."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "white")
    for _ in range(4):
        x, y = rng.integers(width - 12), rng.integers(height - 12)
        colour = tuple(map(int, rng.integers(256, size=3)))
        ImageDraw.Draw(image).rectangle((x, y, x + 10, y + 8), fill=colour)
    return image


SCENES = [scene(48, 32, 0), scene(32, 48, 1), scene(48, 32, 2), scene(40, 40, 3)]


def arrays(pictures: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(picture).astype(int) for picture in pictures]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Folders with small networks of random weights, saved as those on the hub are."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    dinov2 = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    dinov2 |= {"image_size": 28, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True}
    depth = transformers.DepthAnythingConfig(
        backbone_config=transformers.AutoConfig.for_model(**dinov2),
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        initializer_range=0.3,
    )
    convnext = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        initializer_range=0.3,
    )
    upernet = transformers.UperNetConfig(
        backbone_config=convnext, hidden_size=16, num_labels=9, use_auxiliary_head=False, initializer_range=0.3
    )
    mask2former = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=9,
    )  # fmt: skip
    vitpose_backbone = transformers.VitPoseBackboneConfig(
        image_size=(64, 48), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, out_indices=[2],
        initializer_range=0.3,
    )  # fmt: skip
    pose = transformers.VitPoseConfig(backbone_config=vitpose_backbone, num_labels=17, initializer_range=0.3)
    yolos = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    yolos |= {"image_size": [32, 32], "num_detection_tokens": 3, "initializer_range": 0.3}
    person = {"id2label": {0: "person"}, "label2id": {"person": 0}}
    square = {"size": {"height": 32, "width": 32}, **NORMALIZED}
    shorter = {"size": {"shortest_edge": 32, "longest_edge": 64}, **NORMALIZED}
    saved = {
        "depth": (
            transformers.DepthAnythingForDepthEstimation(depth),
            transformers.DPTImageProcessor(
                size={"height": 28, "width": 28}, keep_aspect_ratio=True, ensure_multiple_of=14, **NORMALIZED
            ),
        ),
        "segmentation": (
            transformers.UperNetForSemanticSegmentation(upernet),
            transformers.SegformerImageProcessor(**square),
        ),
        "universal": (
            transformers.Mask2FormerForUniversalSegmentation(mask2former),
            transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}, **NORMALIZED),
        ),
        "pose": (
            transformers.VitPoseForPoseEstimation(pose),
            transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}),
        ),
        "detector": (
            transformers.YolosForObjectDetection(transformers.YolosConfig(**yolos, **person)),
            transformers.YolosImageProcessor(**shorter),
        ),
        "no_person": (
            transformers.YolosForObjectDetection(transformers.YolosConfig(**yolos, id2label={0: "cat"})),
            transformers.YolosImageProcessor(**shorter),
        ),
    }
    for name, (model, processor) in saved.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    network = controls_drawing.HEDNetwork()
    for name, weight in network.named_parameters():
        if "convs" in name and weight.dim() > 1:
            torch.nn.init.kaiming_normal_(weight)
        elif "projection" in name:
            torch.nn.init.normal_(weight, std=0.001)
    save_file(network.state_dict(), root / "hed.safetensors")
    torch.save({name: weight.half() for name, weight in network.state_dict().items()}, root / "hed.pth")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def controls(checkpoints) -> dict:
    hed = HED(checkpoint=checkpoints["hed.safetensors"], resolution=32)
    built = [Depth, Normal, Segmentation]
    named = {kind.name: kind(checkpoint=checkpoints[kind.name.replace("normal", "depth")]) for kind in built}
    pose = Pose(checkpoint=checkpoints["pose"], detector=checkpoints["detector"], min_score=0.0)
    universal = Segmentation(checkpoint=checkpoints["universal"])
    return named | {
        "hed": hed,
        "pose": pose,
        "universal": universal,
        "canny": Canny(),
        "scribble": Scribble(edges=Canny()),
    }


def test_every_control_that_has_a_wording_has_a_transform():
    assert CONTROLS.keys() == processing_prompts.CONTROLS.keys()
    assert all(name == control.name for name, control in CONTROLS.items())


@pytest.mark.parametrize("name", [*CONTROLS, "universal"])
def test_a_batch_of_all_sizes_is_drawn_as_each_picture_alone(controls, name):
    control = controls[name]
    batch = control.draw(SCENES)
    assert [picture.size for picture in batch] == [picture.size for picture in SCENES]
    assert {picture.mode for picture in batch} <= {"L", "RGB"}
    for together, picture in zip(arrays(batch), SCENES):
        (alone,) = arrays(control.draw([picture]))
        assert np.abs(together - alone).max() <= 1  # products of other shapes round otherwise
    assert len({picture.tobytes() for picture in batch}) > 1, "the picture changes nothing"
    again = pickle.loads(pickle.dumps(control))
    assert [picture.tobytes() for picture in again.draw(SCENES)] == [picture.tobytes() for picture in batch]


def test_device_and_dtype_are_those_of_the_network(checkpoints):
    depth = Depth(checkpoint=checkpoints["depth"], device="cpu", dtype=torch.bfloat16)
    assert {(weight.device.type, weight.dtype) for weight in depth.model.parameters()} == {("cpu", torch.bfloat16)}
    wide = Depth(checkpoint=checkpoints["depth"], device="cpu", dtype=torch.float32)
    near = [control.nearness(SCENES[:1]).numpy() for control in (depth, wide)]
    assert np.corrcoef(near[0].ravel(), near[1].ravel())[0, 1] > 0.98
    assert Depth(device="meta").place == (torch.device("meta"), torch.bfloat16)


def test_canny_is_that_of_opencv():
    picture = draw("red", "circle", 64)
    (edges,) = Canny(low=20, high=60).draw([picture])
    assert (np.asarray(edges) == cv2.Canny(np.asarray(picture), 20, 60)).all() and np.asarray(edges).any()
    with pytest.raises(ValueError, match="low=3 and high=2; swap them"):
        Canny(low=3, high=2)


def test_scribbles_are_one_pixel_wide_and_lie_on_the_edges():
    for picture in (draw("blue", "circle", 96), draw("green", "square", 96), scene(96, 128, 5)):
        (edges,), (drawn,) = Canny().draw([picture]), Scribble(edges=Canny()).draw([picture])
        line = np.asarray(drawn) > 0
        assert set(np.unique(drawn)) == {0, 255}
        assert not (line[1:, 1:] & line[:-1, 1:] & line[1:, :-1] & line[:-1, :-1]).any()
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
        assert (line <= (cv2.dilate(np.asarray(edges), disc) > 0)).all()
    parallel = np.full((100, 100, 3), 255, np.uint8)
    parallel[:, 48:51] = 0  # a bar has an edge on either side, and a scribble one line
    parallel = Image.fromarray(parallel)
    (both,), (one,) = Canny().draw([parallel]), Scribble(edges=Canny(), thickness=0.08).draw([parallel])
    assert (np.asarray(both)[50] > 0).sum() == 2 and (np.asarray(one)[50] > 0).sum() == 1


def test_normals_of_a_plane_and_of_a_ball():
    rows, columns = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    plane = controls_drawing.unit_normals((0.5 * columns - 0.25 * rows)[None])
    expected = F.normalize(torch.tensor([-0.5, -0.25, 1.0]), dim=0)  # up is against the rows
    assert torch.allclose(plane, expected.view(1, 3, 1, 1).expand_as(plane), atol=1e-5)
    x, y, radius = columns - 80, 60 - rows, 50.0
    z = (radius**2 - x**2 - y**2).clamp(min=0).sqrt()
    inside = (x**2 + y**2).sqrt() < 0.8 * radius
    ball = controls_drawing.unit_normals(z[None])[0].permute(1, 2, 0)[inside]
    assert torch.allclose(ball, torch.stack([x, y, z], dim=-1)[inside] / radius, atol=2e-3)


def test_depth_and_normals_are_those_of_the_network(checkpoints, controls):
    picture = SCENES[0]
    model = transformers.AutoModelForDepthEstimation.from_pretrained(checkpoints["depth"]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoints["depth"])
    with torch.no_grad():
        outputs = model(**processor([picture], return_tensors="pt"))
    (reference,) = processor.post_process_depth_estimation(outputs, target_sizes=[(32, 48)])
    reference = reference["predicted_depth"]
    near = (reference - reference.min()) / (reference.max() - reference.min())
    drawn = np.asarray(controls["depth"].draw([picture])[0]) / 255
    assert np.abs(drawn - near.numpy()).max() < 0.5 / 255 + 1e-4 and (drawn.min(), drawn.max()) == (0, 1)
    normals = np.asarray(controls["normal"].draw([picture])[0]) / 127.5 - 1
    assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 0.02 and normals[..., 2].min() >= 0


@pytest.mark.parametrize("name", ["segmentation", "universal"])
def test_segments_have_the_colours_of_their_classes(checkpoints, controls, name):
    auto = {"segmentation": "AutoModelForSemanticSegmentation", "universal": "AutoModelForUniversalSegmentation"}[name]
    model = getattr(transformers, auto).from_pretrained(checkpoints[name]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoints[name])
    with torch.no_grad():
        outputs = model(**processor(SCENES[:1], return_tensors="pt"))
    (classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(32, 48)])
    drawn = np.asarray(controls[name].draw(SCENES[:1])[0])
    palette = controls_drawing.class_colours(256)
    assert (drawn == palette[classes.numpy()]).all()
    assert len({tuple(colour) for colour in palette}) == 256
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {number: tuple(map(int, palette[number])) for number in known} == known  # background, aeroplane, bicycle, …


def test_hed_is_vgg_with_edges_from_every_block(checkpoints, controls):
    weights = torch.load(checkpoints["hed.pth"], weights_only=True)
    pixels = torch.from_numpy(np.asarray(SCENES[3]).copy()).permute(2, 0, 1)[None].float()[..., :32, :32]
    hidden, edges = pixels - weights["norm"], []
    for block in range(1, 6):
        for conv in range(2 if block < 3 else 3):
            name = f"block{block}.convs.{conv}"
            hidden = F.conv2d(hidden, weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float(), padding=1)
            hidden = hidden.relu()
        name = f"block{block}.projection"
        edge = F.conv2d(hidden, weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())
        edges.append(F.interpolate(edge, (32, 32), mode="bilinear"))
        hidden = F.max_pool2d(hidden, 2)
    expected = sum(edges).div(5).sigmoid()[0, 0]
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy())
    for name in ("hed.pth", "hed.safetensors"):
        (drawn,) = HED(checkpoint=checkpoints[name], resolution=32).draw([picture])
        assert np.abs(np.asarray(drawn) - expected.mul(255).detach().numpy()).max() < 1
    with pytest.raises(ValueError, match="expected a file, or owner/name/file on the hub, got 'nothing.pth'"):
        HED(checkpoint="nothing.pth").draw(SCENES)


def test_pickles_of_anything_but_tensors_are_refused(tmp_path):
    torch.save({"norm": print}, tmp_path / "hed.pth")
    with pytest.raises(pickle.UnpicklingError):
        HED(checkpoint=str(tmp_path / "hed.pth")).draw(SCENES)


def test_poses_are_drawn_where_the_networks_see_them(checkpoints, controls):
    pose = controls["pose"]
    boxes = pose.persons(SCENES[:1])
    (joints,) = pose.joints(SCENES[:1], boxes)
    assert boxes[0].shape == (3, 4) and joints.shape == (3, 17, 3)
    sure = Pose(checkpoint=checkpoints["pose"], detector=checkpoints["detector"], min_score=1.1)
    assert not np.asarray(sure.draw(SCENES[:1])[0]).any()  # nobody there
    with pytest.raises(ValueError, match=r"the class 'person', got \['cat'\]; name another"):
        Pose(checkpoint=checkpoints["pose"], detector=checkpoints["no_person"]).draw(SCENES)


def test_a_skeleton_joins_its_joints():
    joints = np.zeros((1, 17, 3))
    joints[0, 5] = (20, 40, 0.9)  # the left shoulder, elbow and wrist of somebody
    joints[0, 7] = (60, 40, 0.9)
    joints[0, 9] = (60, 80, 0.2)
    drawn = np.asarray(controls_drawing.draw_skeletons(joints, (100, 100), 0.3)).any(-1)
    assert drawn[40, 20:61].all() and not drawn[50:, :].any()  # the wrist is not sure enough, nor is there a neck
    joints[0, 9, 2] = 0.9
    drawn = np.asarray(controls_drawing.draw_skeletons(joints, (100, 100), 0.3)).any(-1)
    assert drawn[40:81, 60].all()


@pytest.fixture(scope="module")
def sign() -> Image.Image:
    image = Image.new("RGB", (240, 120), "white")
    ImageDraw.Draw(image).text((40, 30), "HELLO", fill="black", font=ImageFont.load_default(36))
    return image


def test_ocr_reads_a_word_and_says_where_it_stands(sign):
    found = OCR().annotate([sign, Image.new("RGB", (96, 96), "white")])
    assert found["ocr_texts"] == [["HELLO"], []] and found["ocr_boxes"][1] == []
    box = np.array(found["ocr_boxes"][0][0])
    drawn = np.array(ImageDraw.Draw(sign).textbbox((40, 30), "HELLO", font=ImageFont.load_default(36)))
    outwards = (box - drawn / (240, 120, 240, 120)) * (-1, -1, 1, 1)
    assert (outwards > 0).all() and (outwards < 0.1).all()
    with pytest.raises(ValueError, match="pip install onnxruntime-gpu"):
        OCR(device="cuda").annotate([sign])


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    cells = [{"bytes": png(picture), "path": None} for picture in SCENES]
    cells[1]["bytes"] = b"broken"
    features = datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"photo": cells, "caption": [*"abcd"]}, features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_added_and_broken_pictures_skipped_and_counted(rows, streaming, capsys):
    source = rows.to_iterable_dataset() if streaming else rows
    canny, scribble = Canny("photo"), Scribble("photo", size=64, edges=Canny())
    done = list(annotated(source, [canny, scribble], batch_size=2))
    assert [row["caption"] for row in done] == ["a", "c", "d"] and canny.skipped == 1 and scribble.skipped == 0
    assert "skipped: expected an image file" in capsys.readouterr().out
    whole = [SCENES[0], SCENES[2], SCENES[3]]
    assert [row["canny"].tobytes() for row in done] == [picture.tobytes() for picture in Canny().draw(whole)]
    assert [row["scribble"].size for row in done] == [(96, 64), (96, 64), (64, 64)]


def test_a_second_run_finds_the_first_one_in_the_cache(rows, tmp_path, monkeypatch):
    rows.to_parquet(tmp_path / "rows.parquet")
    stored = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    first = annotated(stored, [Canny("photo")])
    monkeypatch.setattr(Canny, "draw", lambda self, pictures: pytest.fail("drawn again"))
    assert annotated(stored, [Canny("photo")])["canny"][:] == first["canny"][:]


def test_columns_that_cannot_be(rows):
    with pytest.raises(ValueError, match=r"the column 'image' with pictures, got \['photo', 'caption'\]"):
        annotated(rows, [Canny()])
    with pytest.raises(ValueError, match="no column 'canny' yet"):
        annotated(rows, [Canny("photo"), Canny("photo", size=8)])
