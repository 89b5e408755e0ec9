"""Training by equivalence: one backward pass against two, moving averages against a loop, resumed against unbroken."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import tokenize_images
import torch
import torch.nn.functional as F
import train_tokenizer
from conftest import (
    COLOURS,
    POSITIONS,
    SHAPES,
    TEXT_SIZE,
    draw,
    load_recipe,
    small_config,
    small_model,
    small_vqgan,
    small_vqgan_config,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, TrainingArguments

from cm3leon_hf.modeling_vqgan import VectorQuantizer
from cm3leon_hf.training.checkpoints import last_whole_checkpoint
from cm3leon_hf.training.codebook import CodebookLearner
from cm3leon_hf.training.discriminator import PatchDiscriminator, hinge_loss
from cm3leon_hf.training.perceptual import PerceptualLoss
from cm3leon_hf.training.throughput import ThroughputTrainer
from cm3leon_hf.training.vqgan import VQGANLossConfig, VQGANObjective, psnr

LOSSES = {"discriminator_channels": 8, "discriminator_layers": 1, "adversarial_weight": 0.5}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def objective(**changes) -> VQGANObjective:
    torch.manual_seed(0)
    return VQGANObjective(small_vqgan(), VQGANLossConfig(**LOSSES | {"adversarial_start": 0} | changes)).train()


def started(module: VQGANObjective, pixels: torch.Tensor) -> VQGANObjective:
    """Past its first step, which puts the codebook on latents, and with what the codebook was before the next."""
    module(pixels)
    return module


def test_one_backward_pass_gives_both_players_their_own_gradients():
    pixels = noise(2, 3, 16, 16)
    module = started(objective(), pixels)
    with torch.no_grad():  # what the player of the first pass saw, before the codebook moves
        drawn = module.vqgan(pixels).pixel_values
    module(pixels)["loss"].backward()
    got = {name: weight.grad.clone() for name, weight in module.discriminator.named_parameters()}
    module.zero_grad()
    hinge_loss(module.discriminator(pixels), module.discriminator(drawn)).backward()
    assert sum(gradient.abs().sum() for gradient in got.values()) > 0
    for name, weight in module.discriminator.named_parameters():  # the last bias's two halves cancel
        torch.testing.assert_close(got[name], weight.grad, msg=name)


def test_the_discriminators_loss_moves_no_weight_of_the_generator():
    pixels = noise(2, 3, 16, 16)
    module = objective()
    generator = [weight for weight in module.vqgan.parameters() if weight.requires_grad]
    outputs = module(pixels)
    assert torch.autograd.grad(outputs["discriminator"], generator, retain_graph=True, allow_unused=True) == (
        None,
    ) * len(generator)
    gradients = torch.autograd.grad(outputs["generator"], generator, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    players = torch.autograd.grad(outputs["generator"], [*module.discriminator.parameters()], allow_unused=True)
    assert players == (None,) * len(players)


def test_the_adversarial_weight_balances_the_gradients_at_the_last_layer():
    module, pixels = objective(), noise(2, 3, 16, 16)
    last = module.vqgan.decoder.conv_out.weight
    outputs = module(pixels)
    norms = [
        torch.autograd.grad(outputs[name], last, retain_graph=True)[0].norm()
        for name in ("reconstruction", "generator")
    ]
    torch.testing.assert_close(norms[1], 0.5 * norms[0], rtol=1e-2, atol=0)  # adversarial_weight times


def test_losses_begin_when_they_should_and_add_up():
    module, pixels = objective(adversarial_start=1, l1_weight=2.0, l2_weight=3.0), noise(2, 3, 16, 16)
    first, second = module(pixels), module(pixels)
    assert set(second) - set(first) == {"generator", "discriminator"}
    for outputs in (first, second):
        parts = [value for name, value in outputs.items() if name not in ("loss", "psnr")]
        torch.testing.assert_close(outputs["loss"], sum(parts))
    module.eval()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    outputs = module(pixels)
    drawn = module.vqgan(pixels).pixel_values
    torch.testing.assert_close(outputs["reconstruction"], 2 * F.l1_loss(drawn, pixels) + 3 * F.mse_loss(drawn, pixels))
    torch.testing.assert_close(outputs["commitment"], module.vqgan(pixels).loss)
    assert set(outputs) == set(first)
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())  # nothing moves


def test_psnr_in_decibels():
    real = torch.zeros(2, 3, 4, 4)
    drawn = real.clone()
    drawn[1] += 0.2
    values = psnr(real, drawn)
    assert values[1].item() == pytest.approx(20.0, abs=1e-3)  # a tenth of the range 2 is 20 dB
    assert values[0] > 90


def small_quantizer() -> VectorQuantizer:
    return VectorQuantizer(small_vqgan_config(num_embeddings=5, embed_dim=3))


@pytest.fixture
def learner():
    quantizer = small_quantizer()
    learner = CodebookLearner(5, 3, decay=0.9, revive_below=0.03)
    learner.start(quantizer, noise(2, 3, 4, 4))
    return learner, quantizer


def test_the_codebook_starts_on_latents_once(learner):
    learner, quantizer = learner
    codebook = quantizer.embedding
    latents = noise(2, 3, 4, 4).permute(0, 2, 3, 1).reshape(-1, 3)
    assert all((latents == vector).all(1).any() for vector in codebook.weight)
    before = codebook.weight.clone()
    learner.start(quantizer, noise(2, 3, 4, 4, seed=1))
    assert torch.equal(codebook.weight, before)


def test_moving_averages_equal_a_loop(learner):
    learner, quantizer = learner
    codebook = quantizer.embedding
    usage, sums = [1.0] * 5, [vector.clone() for vector in codebook.weight.detach()]
    for step in range(4):
        latents, codes = noise(2, 3, 4, 4, seed=step), torch.arange(32).view(2, 16) % 5
        learner.update(quantizer, latents, codes)
        flat = [latents[image, :, row, column] for image in range(2) for row in range(4) for column in range(4)]
        for code in range(5):
            chosen = [vector for vector, used in zip(flat, codes.flatten().tolist()) if used == code]
            usage[code] = 0.9 * usage[code] + 0.1 * len(chosen)
            sums[code] = 0.9 * sums[code] + 0.1 * sum(chosen)
            torch.testing.assert_close(codebook.weight[code].detach(), sums[code] / usage[code])
    assert learner.statistics() == {"dead_codes": 0, "codebook_perplexity": pytest.approx(5.0, abs=0.1)}


def test_dead_codes_are_revived_and_the_living_left_alone(learner):
    learner, quantizer = learner
    codebook = quantizer.embedding
    codes = torch.zeros(2, 16, dtype=torch.long)  # only the first code is ever used
    revived = []
    for step in range(80):
        latents = noise(2, 3, 4, 4, seed=1 + step)
        before = codebook.weight.detach().clone()
        learner.update(quantizer, latents, codes)
        flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
        moved = (codebook.weight != before).any(1)
        on_latents = torch.stack([(flat == vector).all(1).any() for vector in codebook.weight])
        assert not on_latents[0]
        if on_latents[1:].any():
            assert on_latents[1:].all() and moved[1:].all()
            revived.append(step)
    # 0.9 ** 34 is the first power below 0.03; a revived code counts as used once
    assert revived == [33, 67]
    assert learner.statistics()["dead_codes"] == 4
    learner.reset_counts()
    assert learner.statistics() == {"dead_codes": 5, "codebook_perplexity": 1.0}


def test_revived_codes_land_where_a_code_is_missing():
    """A background that is common and well served, and a few latents far from every code."""
    quantizer, learner = small_quantizer(), CodebookLearner(5, 3, decay=0.1, revive_below=0.5)
    background, rare = torch.zeros(1, 3, 4, 4), 9 + noise(1, 3, 4, 4)
    learner.start(quantizer, background)
    latents = torch.where(torch.arange(16).view(4, 4) < 14, background, rare)
    for _ in range(4):
        learner.update(quantizer, latents, quantizer.nearest(latents))
    assert (quantizer.embedding.weight.norm(dim=1) > 8).sum() >= 2
    assert len(quantizer.nearest(latents).unique()) == 3  # the background and each of the two


def test_an_entropy_weight_makes_rare_codes_cost_their_bits():
    quantizer, learner = small_quantizer(), CodebookLearner(5, 3, decay=0.5, entropy_weight=0.7)
    learner.start(quantizer, noise(2, 3, 4, 4))
    codes = torch.tensor([[0] * 8 + [1] * 4 + [2] * 2 + [3, 4]] * 2)
    for _ in range(20):
        learner.update(quantizer, noise(2, 3, 4, 4), codes)
    shares = torch.tensor([8, 4, 2, 1, 1]) / 16
    torch.testing.assert_close(quantizer.rates, -0.7 * shares.log(), rtol=1e-3, atol=1e-3)
    latents = noise(1, 3, 4, 4, seed=5)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    costs = torch.cdist(flat, quantizer.embedding.weight).square() + quantizer.rates
    assert torch.equal(quantizer.nearest(latents)[0], costs.argmin(1))
    assert not torch.equal(costs.argmin(1), torch.cdist(flat, quantizer.embedding.weight).argmin(1))


class Replicas(threading.local):
    """Two threads in the place of two processes, with the two collective operations that the codebook needs."""

    barrier, values = threading.Barrier(2, timeout=60), [None, None]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.barrier.wait()
        self.values[self.rank] = tensor.clone()
        self.barrier.wait()
        return list(self.values)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return sum(self.gather(tensor))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.gather(tensor)[0]


def test_replicas_keep_the_same_codebook(monkeypatch):
    world = Replicas()
    for name in ("reduce", "broadcast"):
        monkeypatch.setattr(f"cm3leon_hf.training.codebook.{name}", getattr(world, name))

    def learn(rank: int) -> tuple[torch.Tensor, CodebookLearner]:
        world.rank = rank
        quantizer, learner = small_quantizer(), CodebookLearner(5, 3, decay=0.5)
        for step in range(8):  # few enough uses for codes to die and to be revived
            latents = noise(2, 3, 4, 4, seed=2 * step + rank)
            learner.start(quantizer, latents)
            learner.update(quantizer, latents, torch.full((2, 16), rank))
        return quantizer.embedding.weight.detach(), learner

    with ThreadPoolExecutor(2) as pool:
        (first, learner), (second, _) = pool.map(learn, range(2))
    assert torch.equal(first, second)
    assert learner.counts.tolist() == [8 * 32, 8 * 32, 0, 0, 0]


def test_the_discriminator_judges_each_picture_by_itself():
    discriminator, pixels = PatchDiscriminator(base_channels=8, num_layers=2), noise(3, 3, 32, 32)
    together = discriminator(pixels)
    assert together.shape[:2] == (3, 1)
    torch.testing.assert_close(torch.cat([discriminator(image[None]) for image in pixels]), together)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert hinge_loss(real, fake) == 0.5 * (0.25 + 0.75)


def test_the_perceptual_distance_is_frozen_and_zero_for_the_same():
    loss = PerceptualLoss("test_resnet.r160_in1k", pretrained=False).train()
    first, second = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1).requires_grad_()
    assert not any(module.training for module in loss.modules())
    assert not any(weight.requires_grad for weight in loss.parameters())
    assert loss(first, first) == 0 and loss(first, second) > 0
    loss(first, second).backward()
    assert second.grad.abs().sum() > 0
    maps = zip(
        loss.features((first / 2 + 0.5 - loss.mean) / loss.std),
        loss.features((second / 2 + 0.5 - loss.mean) / loss.std),
    )
    layers = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in maps]
    torch.testing.assert_close(loss(first, second), torch.stack(layers).mean())


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory) -> str:
    """Two splits of drawn pictures with captions, and a broken picture among them."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "data").mkdir()
    rows = [
        {
            "image": draw(colour, shape, size),
            "captions": [f"a {colour} {shape}", f"{shape}, {colour}, size {size}"],
            "colour": colour,
        }
        for size in (20, 24)
        for colour in COLOURS
        for shape in SHAPES
    ]
    string = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(string), "colour": string})
    for split, part in {"train": rows, "heldout_pairs": rows[::5]}.items():
        data = datasets.Dataset.from_list(part, features=features)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def logged(checkpoint: str) -> list[dict]:
    """What the Trainer logged at each step."""
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    return [log for log in state["log_history"] if "loss" in log]


def training(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "report_to": "none",
        }
        | changes
    )


@pytest.fixture(scope="module")
def vqgan_recipe(drawn_data):
    recipe = load_recipe("vqgan/train.py")
    shape = small_vqgan().config.to_diff_dict()
    fields = ("resolution", "base_channels", "channel_multiplier", "num_res_blocks", "attn_resolutions")
    fields += ("latent_channels", "embed_dim", "num_embeddings", "norm_num_groups")
    data = recipe.DataArguments(dataset=drawn_data, vqgan={name: shape[name] for name in fields})

    def run(folder, **changes) -> dict:
        recipe.main(data, VQGANLossConfig(**LOSSES | {"adversarial_start": 1}), training(folder, **changes))
        return load_file(f"{folder}/model.safetensors")

    return run


@pytest.fixture(scope="module")
def trained_vqgan(vqgan_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    return str(folder), vqgan_recipe(folder, max_steps=4)


def test_a_resumed_vqgan_equals_an_unbroken_one(vqgan_recipe, trained_vqgan, tmp_path):
    unbroken = trained_vqgan[1]
    stopped = vqgan_recipe(tmp_path, max_steps=2)
    torn = tmp_path / "checkpoint-3"  # as a machine that dies while saving leaves it
    torn.mkdir()
    resumed = vqgan_recipe(tmp_path, max_steps=4)
    assert any(not torch.equal(stopped[name], value) for name, value in unbroken.items())
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_the_trainer_logs_every_loss_and_the_codebooks_use(trained_vqgan):
    folder, _ = trained_vqgan
    steps = logged(last_whole_checkpoint(folder))
    parts = ("commitment", "reconstruction", "generator", "discriminator")
    assert all(log["loss"] == pytest.approx(sum(log[name] for name in parts if name in log), abs=2e-3) for log in steps)
    assert "generator" not in steps[0] and "generator" in steps[1]


def test_last_whole_checkpoint(tmp_path):
    assert last_whole_checkpoint(str(tmp_path)) is last_whole_checkpoint(str(tmp_path / "nowhere")) is None
    (tmp_path / "checkpoint-13").mkdir()
    for step, state in ((9, "{}"), (10, '{"epoch": 1}'), (11, ""), (12, '{"epoch"')):  # of the last, half is written
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_from_pictures_to_a_model_that_draws(drawn_data, trained_vqgan, tmp_path, monkeypatch):
    """The recipes one after the other, each a few steps long: what one writes, the next reads."""
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    vqgan, tokenizer, codes, model = (
        trained_vqgan[0],
        *(str(tmp_path / name) for name in ("tokenizer", "codes", "model")),
    )
    train_tokenizer.main(
        train_tokenizer.TokenizerArguments(dataset=drawn_data, output_dir=tokenizer, text_vocab_size=TEXT_SIZE)
    )
    tokenize_images.main(tokenize_images.CodesArguments(dataset=drawn_data, vqgan=vqgan, output_dir=codes))
    small_config(initializer_range=0.02, zero_init="residual").save_pretrained(tmp_path / "config")
    recipe = load_recipe("pretrain/train.py")
    arguments = recipe.PretrainArguments(
        dataset=codes,
        model_config=str(tmp_path / "config"),
        tokenizer=tokenizer,
        vqgan=vqgan,
        generation={"guidance_scale": 3.0, "max_new_tokens": 5},
        card={"license": "mit", "language": "en"},
    )
    objective = recipe.ObjectiveArguments(whole_segment=0.5, instruction_share=0.2)
    recipe.main(arguments, objective, training(model, max_steps=3, learning_rate=5e-3))
    losses = [log["loss"] for log in logged(f"{model}/checkpoint-3")]
    assert len(losses) == 3 and losses[-1] < losses[0]

    arguments.init_from, model = model, str(tmp_path / "second")
    arguments.muon, arguments.balance, arguments.passes = True, ["colour"], 2
    recipe.main(arguments, objective, training(model, max_steps=3, learning_rate=5e-3))
    second = [log["loss"] for log in logged(f"{model}/checkpoint-3")]
    assert second[0] < losses[0] and second[-1] < second[0]

    loaded, processor = AutoModelForCausalLM.from_pretrained(model), AutoProcessor.from_pretrained(model)
    assert loaded.dtype == torch.bfloat16 and loaded.config.max_position_embeddings == POSITIONS
    ids = loaded.generate(**processor.for_text_to_image(["a red circle"] * 2), generation_mode="image", do_sample=True)
    card = ModelCard.load(f"{model}/README.md")
    assert card.data.license == "mit" and "| steps | 3 |" in card.text and "| optimiser | Muon |" in card.text
    assert [one.metric_type for one in card.data.eval_results] == ["eval_loss"]
    images = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [image.size for image in images] == [(16, 16)] * 2
    inputs = processor.for_image_to_text(draw("red", "circle"), "Describe the given picture.")
    assert loaded.generate(**inputs).shape[1] <= inputs["input_ids"].shape[1] + 5


def test_broken_pictures_are_skipped_and_files_are_read(trained_vqgan, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        draw("red", "circle").save(folder / f"{name}.png")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:60])
    arguments = {"vqgan": trained_vqgan[0], "output_dir": str(tmp_path / "codes")}
    tokenize_images.main(tokenize_images.CodesArguments(dataset=str(folder), **arguments))
    assert "train: 3 pictures, 1 skipped" in capsys.readouterr().out
    rows = datasets.load_dataset(str(tmp_path / "codes"), split="train")["codes"]
    processor = tokenize_images.AutoImageProcessor.from_pretrained(trained_vqgan[0])
    vqgan = tokenize_images.CM3LeonVQGAN.from_pretrained(trained_vqgan[0])
    pixels = processor([Image.open(folder / "a.png")], return_tensors="pt")["pixel_values"]
    assert list(rows) == vqgan.encode(pixels).tolist() * 3


def test_throughput_counts_tokens_and_leaves_padding_out(tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon_hf.training.throughput.matmul_tflops", lambda dtype, device: 1.0)
    model = small_model()
    trainer = ThroughputTrainer(model=model, args=training(tmp_path, max_steps=1))
    ids = torch.randint(6, 600, (2, 10))
    labels = ids.clone()
    labels[1, 6:] = -100
    monkeypatch.setattr(ThroughputTrainer.__base__, "training_step", lambda *_: torch.tensor(0.0))
    trainer.training_step(model, {"input_ids": ids, "labels": labels})
    assert trainer.tokens == 16
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name)
    head = 632 * 32
    assert trainer.flops == pytest.approx(6 * (matrices + head) * 16 + 12 * 2 * 32 * (100 + 36) / 2)
