"""Perplexity of a model on a neutral text, over fixed windows: how far general language has suffered.

Windows do not overlap and hold the same tokens for every model of a tokenizer, so that two models' numbers may be
compared; numbers of different tokenizers may not. This module does not know which text is neutral.
"""

import math

import torch
from torch.nn.functional import cross_entropy

from app.errors import DataError
from app.models import LoadedModel

WINDOW = 256


def perplexity(loaded: LoadedModel, text: str, *, window: int = WINDOW) -> float:
    """Return exp of the mean negative log-likelihood per token; the first token of a window only conditions.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        part = torch.tensor([ids[start : start + window]], device=loaded.model.device)
        if part.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = loaded.model(input_ids=part).logits[0, :-1].float()
        total += float(cross_entropy(logits, part[0, 1:], reduction="sum"))
        count += part.shape[1] - 1
    if not count:
        msg = f"a text of {len(ids)} tokens is too short to measure perplexity"
        raise DataError(msg)
    return math.exp(total / count)
