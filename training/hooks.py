"""What attaches to the training loop from outside: hook(step, metrics), after each step.

    the log, --log_samples, --eval_steps, --eval_answers, --report_to TRACKER -> hooks
"""

from contextlib import nullcontext


def make_hooks(bundle, steps, log, validator, held_out) -> list:
    """held_out: the samples that the validator measures, or None without any."""
    settings, distributed = steps.settings, steps.distributed
    hooks = [log.step]
    if settings.report_to and distributed.main:
        from extras.trackers import open_tracker  # here: a tracker is an extra

        log.tracker = open_tracker(settings, log.first_step)
    if settings.log_samples:
        hooks.append(lambda step, metrics: log.samples(step, distributed.gather(steps.sources)))
    if validator:
        hooks.append(every_eval(steps, lambda step: log.evaluation(
            step, validator.losses(bundle.model, settings, distributed))))
    if validator and settings.eval_answers:
        hooks += answer_hooks(bundle, steps, log, held_out)
    return hooks


def answer_hooks(bundle, steps, log, held_out) -> list:
    """--eval_answers: none without extras/sample_generations.py, and none under fsdp."""
    settings, distributed = steps.settings, steps.distributed
    if settings.parallel == "fsdp" and distributed.world_size > 1:
        log.say("answers   none while it trains: under --parallel fsdp every process would have to "
                "go through each token; eval.py asks the checkpoints")
        return []
    try:
        from extras.sample_generations import Answers  # here: sample answers are an extra
    except ModuleNotFoundError as error:
        log.say(f"answers   none while it trains: {error}")
        return []
    answers = Answers(held_out, bundle.template, bundle.processor, settings)
    return [every_eval(steps, lambda step: log.answers(
        step, answers.ask(bundle.model, settings, distributed)))]


def every_eval(steps, act):
    """-> a hook that calls act(step) on every --eval_steps-th step and after the last."""
    def hook(step: int, metrics: dict) -> None:
        if step % steps.settings.eval_steps == 0 or step == steps.total:
            act(step)

    return hook


def report_at_end(out, main: bool):
    """The context that writes OUT/report.html when a run ends, where that can be done."""
    try:
        from extras.report import reported  # here: the report is an extra
    except ModuleNotFoundError as error:
        if main:
            print(f"no report.html: {error}")
        return nullcontext()
    return reported(out, main)
