"""Training loops of lightly, Lightning and accelerate in which only the criterion is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from lightly.transforms.simclr_transform import SimCLRTransform
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


# ---- Lightning -------------------------------------------------------------------------------------------------------
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
        assert z0.dtype == {"bf16-mixed": torch.bfloat16, "32-true": torch.float32}[self.trainer.precision]
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
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(tmp_path: Path, precision: str) -> None:
    """Mixed precision, accumulation of gradients, and a run that is resumed is the run that was not interrupted."""
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 2}
    whole, first, second = Module(), Module(), Module()
    trainer(tmp_path, max_epochs=4, **options).fit(whole, loader())
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
