"""EleutherAI's lm-evaluation-harness, driven through its own API: `lm_eval:arc_easy,hellaswag`.

The harness loads its tasks' data from the hub, unless a task file of your own (`include_path`) names local files.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qcore import ConfigError, EvalTask, EvaluationError, ModelError, Options, PluginError, hookimpl


class HarnessOptions(Options):
    """num_fewshot: examples before each question, None for the task's own. limit: questions per task at most.
    include_path: folder of further task files; include_defaults=False leaves the harness's own out, which starts sooner. batch_size: of the harness. seed: of its random choices.
    """

    num_fewshot: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    include_path: str | None = None
    include_defaults: bool = True
    batch_size: int = Field(1, ge=1)
    seed: int = 0


class Harness(EvalTask):
    name = "lm_eval"
    description = "tasks of lm-evaluation-harness, as lm_eval:NAME,NAME"
    Params = HarnessOptions

    def run(self, model: Any, tokenizer: Any, params: HarnessOptions, argument: str = "") -> dict[str, float]:
        """Return {"TASK/METRIC": value} of every task named in `argument`."""
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PluginError(
                f"task 'lm_eval' needs lm-evaluation-harness ({error}): pip install 'qcore[eval]'."
            ) from None
        names = [name.strip() for name in argument.split(",") if name.strip()]
        if not names:
            raise ConfigError("task 'lm_eval' needs names behind a colon, for instance lm_eval:arc_easy,hellaswag.")
        if tokenizer is None:
            raise ModelError("task 'lm_eval' reads text, and the model has no tokenizer: pass tokenizer=.")
        manager = TaskManager(include_path=params.include_path, include_defaults=params.include_defaults)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if unknown:
            raise ConfigError(
                f"lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(map(repr, unknown))}."
            )
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=params.batch_size)
        try:
            found = lm_eval.simple_evaluate(
                wrapped, tasks=names, task_manager=manager, num_fewshot=params.num_fewshot, limit=params.limit,
                random_seed=params.seed, numpy_random_seed=params.seed, torch_random_seed=params.seed,
                fewshot_random_seed=params.seed, bootstrap_iters=0,
            )  # fmt: skip
        except (OSError, ConnectionError) as error:
            raise EvaluationError(f"the data of {argument} cannot be had: {error}") from None
        return _flat(found["results"])


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{"TASK/METRIC": value}; the harness's ",none" (no filter) and standard errors are left out."""
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float)) and "_stderr" not in metric and metric != "sample_len"
    }


@hookimpl
def qcore_eval_tasks() -> list[EvalTask]:
    return [Harness()]
