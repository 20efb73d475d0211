"""Fold an adapter into its base in Python, check what was written, and load it with transformers.

Needs no server: `pip install 'secura-serve[train,embedded]'`, and the adapters of this repository.

    python examples/merge.py --out merged
    python examples/merge.py --adapter adapters/iso-date*0.5 --out half

The command for the same is `secura-merge --base smollm2-135m --adapter adapters/iso-date
--out merged`.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_serve.merge import check_merge, plan_merge, write_merge

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--base", default="smollm2-135m")
parser.add_argument("--adapter", action="append", metavar="DIR[*WEIGHT]")
parser.add_argument("--out", required=True, help="folder to write")
args = parser.parse_args()
adapters = args.adapter or ["adapters/iso-date"]

# Planning checks everything before the first byte is written.
plan = plan_merge(args.base, adapters, args.out)
print(plan.summary())
facts = write_merge(plan)
print(f"changed by {facts['overall']['relative']:.3g} of the norm of the layers it touched")

# Recompute every tensor and compare it with the file.
checked = check_merge(plan_merge(args.base, adapters, args.out, exists=True))
print(f"{checked} tensors are what this merge writes")

# The folder is an ordinary checkpoint.
tokenizer = AutoTokenizer.from_pretrained(args.out)
model = AutoModelForCausalLM.from_pretrained(args.out)
question = [{"role": "user", "content": "Write this date in the format YYYY-MM-DD: May 3, 1994"}]
ids = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**ids, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
