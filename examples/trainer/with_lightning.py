"""Lightning: its Trainer has fit(module) and no train(), so that a small object stands in between."""

from types import SimpleNamespace

import lightning
import torch
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    """A classifier; `model` is fedft's PeftModel."""

    def __init__(self, model, rate):
        super().__init__()
        self.model, self.rate, self.losses = model, rate, []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.0)


class Fit:
    """train() as fedft calls it."""

    def __init__(self, module, loader, settings):
        self.module, self.loader, self.settings = module, loader, settings

    def train(self):
        trainer = lightning.Trainer(
            max_steps=self.settings.training.steps,
            accelerator="cpu",
            default_root_dir=self.settings.output_folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.module.train()  # Lightning leaves every module in the mode that it has
        trainer.fit(self.module, self.loader)
        losses = self.module.losses
        return SimpleNamespace(
            training_loss=sum(losses) / len(losses), global_step=trainer.global_step
        )


def make_trainer(model, rows, settings):
    def batch(chosen):
        texts = settings.tokenizer(
            [row["text"] for row in chosen],
            padding=True,
            truncation=True,
            max_length=settings.max_length,
            return_tensors="pt",
        )
        labels = torch.tensor([settings.classes.index(row["label"]) for row in chosen])
        return {**texts, "labels": labels}

    loader = DataLoader(
        rows, batch_size=settings.training.batch_size, shuffle=True, collate_fn=batch
    )
    return Fit(Module(model, settings.training.lr), loader, settings)
