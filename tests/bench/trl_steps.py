"""One training step as TRL 1.16 takes it, for each objective that TRL has: loss and gradient.

TRL is given what our groups hold, as its own collators would lay it out, and nothing of it is changed but `_prepare_dataset`
and `tokenize_row`, which would make token ids out of text.
"""

import torch
from datasets import Dataset

AOT = "tests.training.coupled:aot"
OBJECTIVES = {
    "dpo": {"beta": 0.3},
    "dpo with sft_weight": {"beta": 0.3, "sft_weight": 0.7},
    "dpo with wpo": {"beta": 0.3, "wpo": True},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.3, "normalize": "token_mean"},
    "hinge": {"beta": 0.3},
    "dpo_norm": {"beta": 3.0},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.4, "label_smoothing": 0.1},
    "cpo": {"beta": 0.3, "nll_weight": 0.6},
    "orpo": {"lambda": 0.3},
    "sft": {},
    "kto": {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.25},
    "apo_zero_unpaired": {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.25},
    AOT: {"beta": 0.3},
}
"""Options by objective; a name may say more after its first word. What ships beside them, `dpop` alone, TRL does not have."""

_DPO = {
    "dpo": ["sigmoid"],
    "robust": ["robust"],
    "ipo": ["ipo"],
    "hinge": ["hinge"],
    "dpo_norm": ["sigmoid_norm"],
    "apo_zero": ["apo_zero"],
    "apo_down": ["apo_down"],
    AOT: ["aot"],
}


def trl_step(objective, options, *, policy, reference, tokenizer, groups, strangers, folder):
    """Return the loss and the gradients by parameter name.

    Args:
        objective: ours.
        options: ours.
        policy: a plain model, which keeps the gradients.
        reference: a plain model.
        tokenizer: of both.
        groups: what is judged, without answers to other prompts.
        strangers: groups of answers to other prompts, for the KL.
        folder: for TRL's output.
    """
    shared = {
        "output_dir": str(folder),
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "use_cpu": True,
    }
    if objective in _DPO:
        trainer, batch = _dpo(objective, options, shared, policy, reference, tokenizer, groups)
    elif objective in ("simpo", "cpo", "orpo"):
        trainer, batch = _cpo(objective, options, shared, policy, tokenizer, groups)
    elif objective == "sft":
        trainer, batch = _sft(shared, policy, tokenizer, groups)
    else:
        trainer, batch = _kto(objective, options, shared, policy, reference, tokenizer, groups, strangers)
    policy.train()
    policy.zero_grad()
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def given(trainer_class):
    """Return the trainer as one that takes a data set of token ids as it is."""

    class Given(trainer_class):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def tokenize_row(self, feature, *_, **__):
            return feature

    return Given


def padded(rows, filler):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def masked(prompts, answers, pad):
    """Ids, attention mask and mask of the answers, one row for each answer."""
    ids = padded([[*p, *a] for p, a in zip(prompts, answers, strict=True)], pad)
    attention = padded([[1] * (len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)], 0)
    answered = padded([[0] * len(p) + [1] * len(a) for p, a in zip(prompts, answers, strict=True)], 0)
    return ids, attention, answered


def pairs_of(groups):
    rows = [(g.prompt_ids, g.responses[p.chosen], g.responses[p.rejected]) for g in groups for p in g.pairs]
    return tuple(zip(*rows, strict=True))


def labelled(groups):
    """Prompt, answer and label; TRL knows no weights, so a row of weight 2 comes twice."""
    for group in groups:
        for label in group.labels:
            for _ in range(int(label.weight)):
                yield group.prompt_ids, group.responses[label.response], label.label


def _dpo(objective, options, shared, policy, reference, tokenizer, groups):
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    prompts, chosen, rejected = (list(map(list, part)) for part in pairs_of(groups))
    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    losses, weights = _DPO[objective], [1.0]
    if options.get("sft_weight"):
        losses, weights = [*losses, "sft"], [1.0, options["sft_weight"]]
    arguments = DPOConfig(
        loss_type=losses,
        loss_weights=weights,
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=options.get("wpo", False),
        **shared,
    )
    trainer = given(DPOTrainer)(
        model=policy, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )  # fmt: skip
    return trainer, DataCollatorForPreference(tokenizer.pad_token_id)(rows)


def _cpo(objective, options, shared, policy, tokenizer, groups):
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    prompts, chosen, rejected = pairs_of(groups)
    batch = {}
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        ids, attention, answered = masked(prompts, answers, tokenizer.pad_token_id)
        batch |= {
            f"{name}_input_ids": ids,
            f"{name}_attention_mask": attention,
            f"{name}_labels": ids.masked_fill(answered == 0, -100),
        }
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    if objective == "orpo":
        arguments, kind = ORPOConfig(beta=options["lambda"], **shared), ORPOTrainer
    elif objective == "cpo":
        arguments = CPOConfig(beta=options["beta"], cpo_alpha=options["nll_weight"], loss_type="sigmoid", **shared)
        kind = CPOTrainer
    else:
        gamma = options["beta"] * options["gamma_beta_ratio"]
        smoothing = options["label_smoothing"]
        arguments = CPOConfig(
            beta=options["beta"], simpo_gamma=gamma, label_smoothing=smoothing, cpo_alpha=0.0, loss_type="simpo", **shared
        )  # fmt: skip
        kind = CPOTrainer
    trainer = given(kind)(model=policy, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return trainer, batch


def _sft(shared, policy, tokenizer, groups):
    from trl import SFTConfig, SFTTrainer

    prompts, answers, _ = zip(*labelled(groups), strict=True)
    ids, attention, answered = masked(prompts, answers, tokenizer.pad_token_id)
    data = Dataset.from_list([{"input_ids": row.tolist()} for row in ids])
    trainer = given(SFTTrainer)(
        model=policy, args=SFTConfig(**shared), train_dataset=data, processing_class=tokenizer
    )  # fmt: skip
    batch = {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(answered == 0, -100)}
    return trainer, batch


def _kto(objective, options, shared, policy, reference, tokenizer, groups, strangers):
    from trl import KTOConfig, KTOTrainer

    rows = list(labelled(groups))
    prompts, answers, labels = zip(*rows, strict=True)
    others = [(g.prompt_ids, response) for g in strangers for response in g.responses] or [((1,), (1,))]
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = dict(zip(names, masked(prompts, answers, tokenizer.pad_token_id), strict=True))
    kl = masked(*zip(*others, strict=True), tokenizer.pad_token_id)
    batch |= dict(zip((f"KL_{name}" for name in names), kl, strict=True)) | {"label": torch.tensor(labels)}
    data = Dataset.from_list(
        [
            {"prompt_ids": list(p), "completion_ids": list(a), "KL_completion_ids": list(a), "label": label}
            for p, a, label in rows
        ]
    )
    arguments = KTOConfig(
        loss_type=objective,
        beta=options["beta"],
        desirable_weight=options["desirable_weight"],
        undesirable_weight=options["undesirable_weight"],
        per_device_train_batch_size=2,
        **shared,
    )
    trainer = given(KTOTrainer)(
        model=policy, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    return trainer, batch
