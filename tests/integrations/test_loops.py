"""Training loops of lightly, Lightning and accelerate in which only the criterion is another; two towers, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from lightly.transforms.simclr_transform import SimCLRTransform
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cacr_kernels import CACRLoss, CACRQueueLoss

from .loops import backbone, falls, images, moco, noisy, simclr


# ---- lightly: its modules and its loop, for its criterion and for ours -----------------------------------------------
@pytest.mark.parametrize("criterion", [NTXentLoss(temperature=0.5), CACRLoss(tau_neg=1.0)], ids=["NT-Xent", "CACR"])
def test_simclr(criterion: nn.Module) -> None:
    assert falls(simclr(criterion).losses)


MEMORY = {
    "NT-Xent": lambda: NTXentLoss(temperature=0.1, memory_bank_size=(64, 8)),
    "CACR": lambda: CACRQueueLoss(queue_size=64, dim=8, in_batch=False, tau_neg=5.0),
}


@pytest.mark.parametrize("name", MEMORY)
def test_moco(name: str) -> None:
    losses = moco(MEMORY[name]()).losses
    assert all(x == x for x in losses)  # no NaN
    if name == "CACR":
        assert falls(losses[1:])  # the first step has no negatives


def test_views_of_a_transform() -> None:
    """Lightly's transforms give a list of views, which the criterion takes as it is."""
    from PIL import Image

    transform = SimCLRTransform(input_size=8, gaussian_blur=0.0)
    pictures = [transform(Image.new("RGB", (16, 16), (i, 2 * i, 3 * i))) for i in range(4)]
    views = [torch.stack([views[v].flatten() for views in pictures]) for v in range(2)]
    assert CACRLoss()(views).isfinite()


# ---- two towers, and a compiled step ---------------------------------------------------------------------------------
def test_two_towers() -> None:
    """The recipe of `docs/coming_from.md`: each image finds its text in the batch, and each text its image."""
    torch.manual_seed(0)
    both = torch.randn(32, 8)
    pictures, texts = both @ torch.randn(8, 20), both @ torch.randn(8, 12)
    towers = nn.ModuleList([nn.Linear(20, 6), nn.Linear(12, 6)])
    logit_scale = torch.tensor(14.3)
    criterion = CACRLoss(pairing="ordered", tau_neg=logit_scale / 2)

    def right() -> float:
        x, y = (
            nn.functional.normalize(tower(rows), dim=1) for tower, rows in zip(towers, (pictures, texts), strict=True)
        )
        similarity, own = x @ y.T, torch.arange(32)
        return float((torch.cat([similarity.argmax(1), similarity.argmax(0)]) == own.repeat(2)).float().mean())

    before, optimizer = right(), torch.optim.Adam(towers.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        criterion(towers[0](pictures), towers[1](texts)).backward()
        optimizer.step()
    assert before < 0.2
    assert right() > 0.9


@pytest.mark.filterwarnings("ignore")  # Dynamo asks the loss for its .grad
@pytest.mark.parametrize("queue_size", [0, 16])
def test_a_compiled_step(queue_size: int) -> None:
    """Encoder, loss, backward and optimizer in one compiled function; encoder and loss are one graph."""
    found = []
    for compiled in (True, False):
        model = backbone()
        criterion: Any = CACRQueueLoss(queue_size=16, dim=16) if queue_size else CACRLoss(tau_neg=2.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def loss_of(x0: Tensor, x1: Tensor, model: nn.Module = model, criterion: Any = criterion) -> Tensor:
            z0, z1 = model(x0), model(x1)
            loss: Tensor = criterion(z0, z1.detach()) if queue_size else criterion(z0, z1)
            return loss

        def step(
            x0: Tensor, x1: Tensor, loss_of: Any = loss_of, optimizer: Any = optimizer, compiled: bool = compiled
        ) -> Tensor:
            loss: Tensor = torch.compile(loss_of, fullgraph=True)(x0, x1) if compiled else loss_of(x0, x1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        whole = torch.compile(step) if compiled else step
        losses = [whole(noisy(images(8), 2 * i), noisy(images(8), 2 * i + 1)) for i in range(6)]
        found.append([*losses, *(p.detach() for p in model.parameters())])
    for mine, eager in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)


# ---- Lightning -------------------------------------------------------------------------------------------------------
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


class Module(lightning.LightningModule):
    """SimCLR with a learnable temperature and a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.model = backbone()
        self.tau = nn.Parameter(torch.tensor(2.0))
        self.criterion = CACRQueueLoss(queue_size=64, dim=16, tau_neg=self.tau)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        z0, z1 = self.model(batch[0]), self.model(noisy(batch[0], index))
        assert z0.dtype == DTYPES[self.trainer.precision]
        loss = self.criterion([z0, z1], [z0.detach(), z1.detach()])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(images()), batch_size=8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", DTYPES)
def test_lightning(tmp_path: Path, precision: str) -> None:
    """Mixed precision, accumulation of gradients, and a run that is resumed is the run that was not interrupted."""
    scaler = torch.amp.GradScaler("cpu")  # without one Lightning takes bfloat16 on a CPU
    half = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    options: dict[str, Any] = half if precision == "16-mixed" else {"precision": precision}
    options["accumulate_grad_batches"] = 2
    whole, first, second = Module(), Module(), Module()
    trainer(tmp_path, max_epochs=4, **options).fit(whole, loader())
    assert scaler.get_scale() == 2**16  # no step was skipped: nothing overflowed
    assert len(whole.losses) == 16
    assert whole.tau.item() != 2.0
    halfway = trainer(tmp_path, max_epochs=2, **options)
    halfway.fit(first, loader())
    halfway.save_checkpoint(tmp_path / "halfway.ckpt")
    trainer(tmp_path, max_epochs=4, **options).fit(second, loader(), ckpt_path=tmp_path / "halfway.ckpt")
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)


# ---- accelerate ------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
def test_accelerate() -> None:
    """Accumulation over batches, in bfloat16, criterion and encoder prepared together."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    criterion = CACRLoss(tau_neg=nn.Parameter(torch.tensor(2.0)))
    model = nn.ModuleDict({"encoder": backbone(), "criterion": criterion})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    losses = []
    for epoch in range(4):
        for (x,) in batches:
            with accelerator.accumulate(model), accelerator.autocast():
                loss = model["criterion"](model["encoder"](x), model["encoder"](noisy(x, epoch)))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert falls(losses)
    assert criterion.tau_neg.item() != 2.0
