"""A judge of drawn pictures: a small convolutional network that reads what pictures show, trained on real ones."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from .files import atomic, batched, check_as_many

UNKNOWN = -100  # what cross entropy leaves out
BATCH = 256


@dataclass(frozen=True)
class JudgeConfig:
    """
    What a judge is and how it is trained.

    Args:
        network (`str`): A model of timm; its weights begin random.
        size (`int`): Side in pixels that pictures are scaled to.
        views (`int`): Pictures that training looks at, repeated ones counted.
        balance (`float`): In [0, 1]: how much less often pictures of common classes of the first kind are looked at;
            0 is as often as they come, 1 every class equally often.
        changed (`float`): Share of views that are moved, scaled, turned and recoloured at random. They teach only the
            kinds of `lasting`; the others may show in margins and in shades.
        scale, shift, turn (`float`): These are scaled by up to `1 ± scale`, moved by up to this part of their side and
            turned by up to so many radians.
        recolouring (`float`): How much their colours change.
        lasting (`list[str]`): Kinds that such views still show.
        smoothing (`float`): Of labels.
        dropout (`float`): Of features.
        batch_size, learning_rate, weight_decay, seed: Of the training.
    """

    network: str = "resnet10t"
    size: int = 64
    views: int = 200_000
    balance: float = 0.5
    changed: float = 0.5
    scale: float = 0.15
    shift: float = 0.06
    turn: float = 0.08
    recolouring: float = 0.15
    lasting: list[str] = field(default_factory=lambda: ["concept", "gender"])
    smoothing: float = 0.1
    dropout: float = 0.1
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0


class Judge(nn.Module):
    """
    A network with a linear head for each kind of thing that a picture shows.

    Args:
        config ([`JudgeConfig`]): What it is.
        classes (`dict[str, list[str]]`): By kind, such as `"style"`, what is told apart.

    Raises:
        ImportError: without timm.
    """

    def __init__(self, config: JudgeConfig, classes: dict[str, list[str]]):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ImportError("judges need timm; pip install 'cm3leon_hf[eval]'") from error
        self.settings, self.classes = config, classes  # a Trainer takes `config` for its own
        self.network = timm.create_model(config.network, pretrained=False, num_classes=0)
        self.heads = nn.ModuleDict(
            {kind: nn.Linear(self.network.num_features, len(names)) for kind, names in classes.items()}
        )

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The loss of training.

        Args:
            pixels (`torch.Tensor` of shape `(pictures, 3, size, size)`): In [0, 1], 0 for white.
            labels (`torch.LongTensor` of shape `(pictures, kinds)`): Numbers of classes; `UNKNOWN` counts for nothing.

        Returns:
            `dict`: `loss`, the sum over kinds of the cross entropy, per picture.
        """
        features = self.network(pixels.contiguous(memory_format=torch.channels_last))
        features = F.dropout(features, self.settings.dropout, self.training)
        losses = [
            F.cross_entropy(head(features), own, reduction="sum", label_smoothing=self.settings.smoothing)
            for head, own in zip(self.heads.values(), labels.T)
        ]
        return {"loss": torch.stack(losses).sum() / len(pixels)}

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image]) -> tuple[dict[str, list[str]], np.ndarray]:
        """
        What pictures in RGB show: by kind a class for each, and unit features `(pictures, dimension)`.
        """
        device = next(self.parameters()).device
        batches = batched(pictures, BATCH)
        features = [self.eval().network(to_pixels(ink(batch, self.settings.size)).to(device)) for batch in batches]
        features = torch.cat(features)
        found = {
            kind: [self.classes[kind][index] for index in head(features).argmax(dim=1).tolist()]
            for kind, head in self.heads.items()
        }
        return found, F.normalize(features, dim=1).cpu().numpy()

    def save(self, path: str | PathLike) -> None:
        """Writes weights, classes and configuration, whole or not at all, as safetensors."""
        about = {"config": json.dumps(asdict(self.settings)), "classes": json.dumps(self.classes)}
        with atomic(Path(path)) as part:
            save_file({name: weight.contiguous() for name, weight in self.state_dict().items()}, part, about)

    @classmethod
    def load(cls, path: str | PathLike) -> "Judge":
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: for a file that is not there or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                judge = cls(JudgeConfig(**json.loads(about["config"])), json.loads(about["classes"]))
                judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"expected a judge in {path}, could not read it: {error}; remove it") from error
        return judge.eval()


def ink(pictures: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Pictures in RGB as what is missing to white, `(pictures, 3, size, size)` in uint8."""
    scaled = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
    return 255 - torch.from_numpy(np.stack([np.asarray(picture) for picture in scaled])).permute(0, 3, 1, 2)


def to_pixels(found: torch.Tensor) -> torch.Tensor:
    return found.float() / 255


@dataclass
class Views:
    """
    Makes batches of pictures, some moved, scaled, turned and recoloured, in front of white: a collator.

    Args:
        pixels (`torch.Tensor` of shape `(pictures, 3, size, size)`): As [`ink`] makes them.
        labels (`torch.LongTensor` of shape `(pictures, kinds)`): Numbers of classes.
        lasting (`torch.BoolTensor` of shape `(kinds,)`): Which kinds changed views teach.
        config ([`JudgeConfig`]): How much.
        generator (`torch.Generator`): Source of all draws.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    lasting: torch.Tensor
    config: JudgeConfig
    generator: torch.Generator

    def __call__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        found = to_pixels(self.pixels[indices])
        changed = torch.rand(len(indices), generator=self.generator) < self.config.changed
        if changed.any():
            found[changed] = self._recolour(self._move(found[changed]))
        unknown = changed[:, None] & ~self.lasting
        return {"pixels": found, "labels": self.labels[indices].masked_fill(unknown, UNKNOWN)}

    def _move(self, pixels: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(self._moves(len(pixels)), pixels.shape, align_corners=False)
        return F.grid_sample(pixels, grid, align_corners=False)  # zeros, which are white, around

    def _moves(self, count: int) -> torch.Tensor:
        """Affine maps `(count, 2, 3)`."""
        config, draws = self.config, 2 * torch.rand(4, count, generator=self.generator) - 1
        scale, turn = 1 + config.scale * draws[0], config.turn * draws[1]
        cos, sin, shift = scale * turn.cos(), scale * turn.sin(), 2 * config.shift * draws[2:]
        return torch.stack([torch.stack([cos, -sin, shift[0]]), torch.stack([sin, cos, shift[1]])]).permute(2, 0, 1)

    def _recolour(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mixes the channels of each picture; white stays white."""
        noise = torch.randn(len(pixels), 3, 3, generator=self.generator)
        mixed = torch.eye(3) + self.config.recolouring * noise
        return torch.einsum("nij,njhw->nihw", mixed, pixels).clamp(0, 1)


def train_judge(
    pictures: Sequence[Image.Image], shown: dict[str, Sequence[str]], config: JudgeConfig | None = None
) -> Judge:
    """
    Trains a judge.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): In RGB.
        shown (`dict[str, Sequence[str]]`): By kind, what each picture shows; empty where that is unknown. Kinds with
            fewer than two classes are left out.
        config ([`JudgeConfig`], *optional*): How.

    Raises:
        ValueError: if there are not as many labels as pictures, or no kind has two classes.
        ImportError: without timm.
    """
    config = config or JudgeConfig()
    for kind, names in shown.items():
        check_as_many(f"labels of {kind}", names, "pictures", pictures)
    classes = {kind: sorted({*names} - {""}) for kind, names in shown.items()}
    classes = {kind: names for kind, names in classes.items() if len(names) > 1}
    if not classes:
        raise ValueError(f"expected a kind with two classes or more, got none in {sorted(shown)}; add pictures")
    numbers = {kind: dict(zip(names, range(len(names)))) for kind, names in classes.items()}
    labels = torch.tensor([[numbers[kind].get(name, UNKNOWN) for name in shown[kind]] for kind in classes]).T
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    weights = balanced_weights(shown[next(iter(classes))], config.balance)
    order = torch.multinomial(weights, config.views, replacement=True, generator=generator).tolist()
    judge = Judge(config, classes).to(memory_format=torch.channels_last)
    lasting = torch.tensor([kind in config.lasting for kind in classes])
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=judge,
            args=training_arguments(config, folder),
            train_dataset=order,
            data_collator=Views(ink(pictures, config.size), labels, lasting, config, generator),
        )
        trainer.train()
    return judge.eval()


def balanced_weights(names: Sequence[str], balance: float) -> torch.Tensor:
    """How often each picture is drawn, `(pictures,)`: a class's size to the power of `-balance`."""
    counts = Counter(names)
    return torch.tensor([counts[name] ** -balance for name in names])


def training_arguments(config: JudgeConfig, folder: str) -> TrainingArguments:
    """One pass over the views, in bfloat16, with nothing written but a progress bar."""
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.views // config.batch_size // 10,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=torch.accelerator.current_accelerator(check_available=True) is None,
        seed=config.seed,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )


__all__ = ["Judge", "JudgeConfig", "train_judge"]
