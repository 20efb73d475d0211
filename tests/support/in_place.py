"""A vLLM worker on a CPU whose linears stay plain, so that they are folded in place as on a GPU.

vLLM imports this for ``worker_extension_cls`` before it loads a model. Memory is not pinned, which
would need a driver, and nothing is packed for the processor.
"""

from __future__ import annotations

from functools import partial
from itertools import count

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from secura_serve.serve.engine import worker_extension
from secura_serve.serve.engine.fold import shards
from secura_serve.serve.engine.fold.pristine import PristineCopies


def _stay_plain(self, layer):
    layer.cpu_linear = torch.nn.functional.linear


UnquantizedLinearMethod.process_weights_after_loading = _stay_plain
worker_extension.keeps_base = lambda device: True
worker_extension.PristineCopies = partial(PristineCopies, pin=torch.clone)


class Extension(worker_extension.WorkerExtension):
    """Also writes down what a rank holds, and has folds fail."""

    def secura_break(self, ranks):
        """Have these ranks run out of memory in the middle of their next fold; returns what this
        one was told."""
        original, step = shards.fold_shard, count()

        def fold_shard(*given):
            if next(step) == 5:
                shards.fold_shard = original
                raise torch.OutOfMemoryError(f"rank {self.rank} has no memory left")
            original(*given)

        if self.rank in ranks:
            shards.fold_shard = fold_shard
        return f"{self.rank} of {ranks}"

    def secura_save(self, folder, step):
        """Save the matrices of the decoder layers by name, under the step and the rank."""
        named = self.model_runner.get_model().named_parameters()
        held = {n.replace(".base_layer.", "."): p.data for n, p in named if "layers." in n}
        matrices = {n: p for n, p in held.items() if p.ndim == 2}
        torch.save(matrices, f"{folder}/{step}-{self.rank}.pt")
