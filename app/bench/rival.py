"""The rival: TRL's DPOTrainer on the rows of the work, set up as its users would, measured from outside.

Nothing of TRL is changed but what it is given: token ids instead of text (`_prepare_dataset`), so that both train the same
tokens, the order of its rows, a callback that reads the clock, and a collator that notes the shape of each batch. TRL is
an extra (`bench`).

By length, all rows are sorted. TRL's own sampler sorts each 50 steps of a real data set (400 rows), but of 32 rows only
each step by itself; the rows of a work are whole steps out of such a sorted stretch, and sorted they lie in these again
(sampled answers are to random prompts, whose rows are sorted as they are). The first step, which is no part of the steady
state, is one of middle length, where TRL would take the longest.
"""

import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from app.bench.arms import Arm, Measured, section_of
from app.bench.work import Work, pair_rows
from app.models import load_model, load_tokenizer
from app.storage import Home
from app.training.tokenization import Group


def run_trl(work: Work, arm: Arm) -> Measured:
    """Do the work with TRL."""
    torch.set_num_threads(work.threads)
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="prefloop-rival-") as scratch:
        trainer = pinned_trainer(work, arm, work.groups, folder=scratch, callbacks=[clock])
        scored = trainer.data_collator.batches
        trainer.data_collator.batches = []
        trainer.train()
    batches = trainer.data_collator.batches
    each = work.batch_pairs // arm.batch
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Measured(
        score_seconds=trainer.score_seconds,
        step_seconds=tuple(clock.seconds),
        step_pairs=(work.batch_pairs,) * len(clock.seconds),
        step_tokens=tuple(sum(b.pair_tokens for b in batches[i : i + each]) for i in range(0, len(batches), each)),
        losses=tuple(log["loss"] for log in logs),
        logps=tuple(log["logps/chosen"] for log in logs),
        shapes=tuple(b.shape for b in batches),
        score_shapes=tuple(b.shape for b in scored),
        threads=torch.get_num_threads(),
    )


def pinned_trainer(
    work: Work, arm: Arm, groups: Sequence[Group], *, folder: str, callbacks: Sequence[TrainerCallback] = ()
) -> Any:
    """Return a DPOTrainer over the rows of the groups; `score_seconds` is what its reference pass took."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Pinned(DPOTrainer):  # type: ignore[misc]
        score_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            scored = super()._precompute_ref_logps(*arguments, **named)
            self.score_seconds = time.perf_counter() - began
            return scored

        def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
            if arm.order == "sequential":
                return super()._get_train_sampler(*arguments, **named)
            ordered = sorted(range(len(self.train_dataset)), key=lambda i: -lengths[i])
            middle = len(steps) // 2 * work.batch_pairs
            first = ordered[middle : middle + work.batch_pairs]
            return first + ordered[:middle] + ordered[middle + work.batch_pairs :]

    section = section_of(work)
    tokenizer = load_tokenizer(Home.at(work.home_uri), work.model_id)
    rows = [row for group in groups for row in pair_rows(group)]
    # TRL's order is random: pairs of one prompt, which lie together, would be padded less.
    shuffle = random.Random(0).shuffle  # noqa: S311  an order, not a secret
    steps = [rows[i : i + work.batch_pairs] for i in range(0, len(rows), work.batch_pairs)]
    for step in steps:
        shuffle(step)
    lengths = [_length(row) for step in steps for row in step]
    arguments = DPOConfig(
        output_dir=folder,
        beta=section.options["beta"],
        max_length=work.max_length,
        per_device_train_batch_size=arm.batch,
        gradient_accumulation_steps=work.batch_pairs // arm.batch,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=arm.reference == "cached",
        bf16=arm.dtype == "bfloat16",
        gradient_checkpointing=arm.checkpointing,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        num_train_epochs=section.epochs,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=section.seed,
    )
    lora = section.lora
    adapters = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works, the annotation says int
        target_modules=list(lora.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # A frozen base lies in the compute type on both sides; what trains is fp32.
    policy, reference = (
        _model(work, dtype=arm.dtype if work.adapter == "lora" else "float32"),
        None if work.adapter == "lora" or arm.reference == "cached" else _model(work, dtype="float32"),
    )
    return Pinned(
        model=policy,
        ref_model=reference,
        args=arguments,
        data_collator=_Counting(DataCollatorForPreference(tokenizer.pad_token_id, max_length=work.max_length)),
        train_dataset=Dataset.from_list(list(itertools.chain.from_iterable(steps))),
        processing_class=tokenizer,
        peft_config=adapters if work.adapter == "lora" else None,
        callbacks=list(callbacks),
    )


class _Clock(TrainerCallback):
    """Seconds from the end of an optimizer step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step."""
        moment = time.perf_counter()
        self.seconds.append(moment - self._last)
        self._last = moment


@dataclass(frozen=True)
class _Batch:
    shape: tuple[int, int]
    pair_tokens: int


class _Counting:
    """A collator that notes what it makes."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.batches: list[_Batch] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collate(examples)
        rows, length = batch["input_ids"].shape
        tokens = sum(len(example[f"{part}_ids"]) for example in examples for part in ("prompt", "chosen", "rejected"))
        self.batches.append(_Batch((rows, length), tokens))
        return batch


def _model(work: Work, *, dtype: str) -> PreTrainedModel:
    return load_model(Home.at(work.home_uri), work.model_id, dtype=dtype).model.requires_grad_(requires_grad=True)


def _length(row: dict[str, list[int]]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
