"""Supervised fine-tuning by TRL: `python train.py` alone, `fedft simulate config.toml` federated."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def make_trainer(model, rows, settings):
    def said(row, role, column):
        return [{"role": role, "content": row[column]}]

    pairs = Dataset.from_list(
        [
            {"prompt": said(r, "user", "question"), "completion": said(r, "assistant", "answer")}
            for r in rows
        ]
    )
    steps = dict(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3)
    cpu = dict(bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False)
    quiet = dict(save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True)
    same = dict(seed=settings.seed, max_length=settings.max_length)
    config = SFTConfig(settings.output_folder, **same, **steps, **cpu, **quiet)
    return SFTTrainer(model, config, train_dataset=pairs, processing_class=settings.tokenizer)


if __name__ == "__main__":
    from alone import pairs, peft_model, settings

    trainer = make_trainer(peft_model(), pairs(), settings())
    print(trainer.train())
