"""The offline tasks: one file each, and one line here.

A task gives ``train``, ``validation`` and ``test`` rows, the same ones on every machine and never
one prompt in two splits, without a network. Texts with rights of their own are read from the
package that carries them and are not part of this repository.
"""

from secura_serve.evaluate.tasks import (  # noqa: F401  (each registers its tasks)
    arithmetic,
    countries,
    extract,
    iso_date,
    sentiment,
    translation,
)
from secura_serve.evaluate.tasks.registry import TASKS, load_task, register_task, write_data
from secura_serve.evaluate.tasks.task import Task, score

__all__ = ["TASKS", "Task", "load_task", "register_task", "score", "write_data"]
