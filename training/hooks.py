"""What attaches to the training loop from outside: hook(step, metrics), after each step.

    the log, --log_samples, --eval_steps, --eval_answers, --report_to TRACKER -> hooks
"""

from contextlib import nullcontext

from training.device import HAS_EXTRAS
from training.errors import gradient_check
from training.validation import eval_losses


def make_hooks(bundle, steps, log, eval_loaders) -> list:
    """eval_loaders: see validation.eval_losses; empty when nothing is measured."""
    settings, distributed = steps.settings, steps.distributed
    hooks = [gradient_check(steps), log.step]
    if settings.report_to and distributed.main:
        from extras.trackers import open_tracker  # here: a tracker is an extra

        log.tracker = open_tracker(settings, log.first_step)
    if settings.log_samples:
        hooks.append(lambda step, metrics: log.samples(step, distributed.gather(steps.sources)))
    if eval_loaders:
        answers = open_answers(bundle, steps, log, eval_loaders[0].data)

        def evaluate(step: int, metrics: dict) -> None:
            if step % settings.eval_steps == 0 or step == steps.total:
                log.evaluation(step, eval_losses(bundle.model, eval_loaders, settings, distributed))
                if answers:
                    log.answers(step, answers.ask(bundle.model, settings, distributed))

        hooks.append(evaluate)
    return hooks


def open_answers(bundle, steps, log, held_out):
    """--eval_answers: None without extras/sample_generations.py, and under fsdp."""
    settings = steps.settings
    if not settings.eval_answers:
        return None
    if settings.parallel == "fsdp":
        log.say("answers   none while it trains: under --parallel fsdp every process would have to "
                "go through each token; eval.py asks the checkpoints")
        return None
    try:
        from extras.sample_generations import Answers  # here: sample answers are an extra
    except ModuleNotFoundError as error:
        log.say(f"answers   none while it trains: {error}")
        return None
    return Answers(held_out, bundle.template, bundle.processor, settings)


def report_at_end(out, main: bool):
    """The context that writes OUT/report.html when a run ends, where that can be done."""
    if HAS_EXTRAS:
        from extras.report import reported  # here: the report is an extra

        return reported(out, main)
    if main:
        print("no report.html: extras/ is missing")
    return nullcontext()
