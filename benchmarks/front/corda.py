"""CorDA in PEFT, trained by the same trainer on the same rows: a relative to compare with.

Knowledge-preserved mode: A and B start as the components of W that the base's inputs excite least
(arXiv 2406.05223), and W as the rest. The inputs are those of text that the base wrote by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import set_seed
from transformers.utils import logging as hf_logging

from secura_serve.train.data import encode, read, sample_base_text
from secura_serve.train.loop.fit import fit
from secura_serve.train.methods import PreparedModel
from secura_serve.train.methods.base import load_base
from secura_serve.train.run import Run
from secura_serve.train.settings import TrainConfig

__all__ = ["train_corda"]


def train_corda(config: TrainConfig) -> Run:
    """Train as ``secura-train --method lora`` does, from where CorDA starts."""
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    model, tokenizer, model_id = load_base(config.base, config.dtype, config.device)
    rows = encode(read(config.data, columns={}, labels=[]), tokenizer, config.max_length)
    text = sample_base_text(model, tokenizer, sequences=64, length=96, seed=0)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.lora_alpha or 2 * config.rank,
        target_modules=config.target_modules(),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", verbose=False),
    )

    @torch.no_grad()
    def run_model() -> None:
        # Row by row: PEFT's hook takes a batch of one.
        for tokens in text.tokens.to(model.device).split(1):
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    preprocess_corda(model, settings, run_model=run_model)
    tuned: Any = get_peft_model(model, settings)
    prepared = PreparedModel(tuned, tokenizer, model_id, config)
    result = fit(prepared, rows)
    return Run(prepared, {"train_loss": result.train_loss}, result.seconds, result.history)
