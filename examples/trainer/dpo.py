"""Preference pairs by TRL: `python dpo.py` alone; federated with `--set training.trainer=dpo:make_trainer`."""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def make_trainer(model, rows, settings):
    def said(row, role, column):
        return [{"role": role, "content": row[column]}]

    pairs = Dataset.from_list(
        [
            {
                "prompt": said(row, "user", "question"),
                "chosen": said(row, "assistant", "answer"),
                "rejected": said(row, "assistant", "rejected"),
            }
            for row in rows
        ]
    )
    steps = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=5e-4)
    cpu = dict(bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False)
    quiet = dict(save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True)
    same = dict(seed=settings.seed, max_length=settings.max_length)
    config = DPOConfig(settings.output_folder, **same, **steps, **cpu, **quiet)
    return DPOTrainer(model, args=config, train_dataset=pairs, processing_class=settings.tokenizer)


if __name__ == "__main__":
    from alone import pairs, peft_model, settings

    print(make_trainer(peft_model(), pairs(), settings()).train())
