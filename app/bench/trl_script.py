"""What a user of TRL writes: pairs in, DPOTrainer, model out.

python -m app.bench.trl_script WORK.json OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer


def main() -> None:
    """Train and save."""
    work, output = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2]
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(work["threads"])
    adapters = LoraConfig(
        r=work["lora"]["r"],
        lora_alpha=work["lora"]["alpha"],
        target_modules=work["lora"]["target_modules"],
        task_type="CAUSAL_LM",
    ) if work["lora"] else None  # fmt: skip
    settings = {"save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available()}
    trainer = DPOTrainer(
        model=work["model"],
        args=DPOConfig(output_dir=output, **work["arguments"], **settings),
        train_dataset=Dataset.from_list(work["rows"]),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        peft_config=adapters,
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main()
