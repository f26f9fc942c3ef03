"""transformers' Trainer for classification: fedft simulate classify.toml."""

from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments


def make_trainer(model, rows, settings):
    def encoded(row):
        found = settings.tokenizer(row["text"], truncation=True, max_length=settings.max_length)
        return {**found, "labels": settings.classes.index(row["label"])}

    own = settings.training  # the table [training] of the configuration, as far as one wants it
    steps = dict(max_steps=own.steps, per_device_train_batch_size=own.batch_size)
    quiet = dict(save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True)
    arguments = TrainingArguments(
        settings.output_folder,
        seed=settings.seed,
        learning_rate=own.lr,
        lr_scheduler_type="cosine",
        dataloader_pin_memory=False,
        **steps,
        **quiet,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([encoded(row) for row in rows]),
        data_collator=DataCollatorWithPadding(settings.tokenizer),
    )
