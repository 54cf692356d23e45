"""Tries a configuration: ``python -m engine.train.check``.

Reads the configuration as JSON on standard input, loads everything that it names and takes two
steps on two prompts. The last line of standard output is a
:class:`engine.protocol.check_result.CheckResult` or an object with `error`, as JSON. What it writes
is in a temporary folder, which it removes.
"""

import os
import sys

import msgspec
from msgspec.structs import replace
from transformers.utils.logging import disable_progress_bar

from engine.config.schema import RunConfig
from engine.errors import RlhfError, error_text
from engine.metrics import PEAK_MEMORY, STEP_TIME, phase_time
from engine.protocol.check_result import CheckedSample, CheckResult
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.session.temporary_folders import TemporaryFolder
from engine.train.distributed.ranks import RankGroup
from engine.train.load import fit_scales, load_run
from engine.train.models.memory_check import check_memory
from engine.train.models.trusted_code import trusted_code
from engine.train.rollout.rollout import ReportProgress
from engine.train.run import Run
from engine.train.step import train_step

PROMPTS = 2
PHASES = ("generate", "score", "reference", "optimise")
RATIO_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
"""How far the mean ratio before an update may be from 1; rounding explains less."""


def main() -> None:
    """Tries one configuration and prints the result."""
    disable_progress_bar()
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=RunConfig)
    try:
        result: object = check(config)
    except RlhfError as error:
        result = {"error": error_text(error), "exit_code": error.exit_code}
    # Unlike json, this encoder writes null for a metric that is not finite.
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(result) + b"\n")
    sys.stdout.buffer.flush()
    os._exit(0)  # torch's threads may keep the interpreter from ending


def check(config: RunConfig) -> CheckResult:
    """Loads everything and takes two steps.

    Raises:
        RlhfError: something cannot be loaded or used, or the run does not start at ratio 1.
    """
    folder = TemporaryFolder()
    try:
        small = reduced(config)
        ranks = RankGroup(small.launch)
        warnings = list(trusted_code(config))
        session = create(folder.path, "check", small)
        begin = Begin(attempt=1, from_step=0)
        run = load_run(
            session, small, begin, ranks, _report, lambda _rule, text: warnings.append(text)
        )
        fit_scales(run, small)
        return _try(config, run, warnings)
    finally:
        folder.close()


def reduced(config: RunConfig) -> RunConfig:
    """The configuration with two prompts a step, one update and one rank.

    Scores are not normalised: those of a few responses of the reference may not vary.
    """
    reward = replace(
        config.reward,
        normalise="none",
        mix=[replace(source, normalise="none") for source in config.reward.mix],
        retries=0,
    )
    return replace(
        config,
        reward=reward,
        rollout=replace(
            config.rollout, batch_size=PROMPTS * config.responses_per_prompt, dynamic=False
        ),
        ppo=replace(config.ppo, epochs=1, minibatches=1, value_warmup=0),
        launch=replace(config.launch, processes=1, nodes=1, rendezvous=None),
    )


def _try(config: RunConfig, run: Run, warnings: list[str]) -> CheckResult:
    prompts = run.prompts.for_step(1)
    first, samples = train_step(run, 1)
    ratio = first.get("val/ratio")
    if ratio is not None and abs(ratio - 1) > RATIO_LIMIT[config.model.dtype]:
        raise RlhfError(
            f"{type(run.policy.lm).__name__}: the probability ratio is {ratio:.4g} before the "
            "first update, not 1: this architecture cannot be trained safely here"
        )
    run.state.step = 1
    run.config = replace(run.config, ppo=replace(run.config.ppo, epochs=config.ppo.epochs))
    second, _ = train_step(run, 2)
    _strategy, planned = check_memory(config, run.prompts.longest, run.ranks, warnings.append)
    return CheckResult(
        device=str(run.device),
        dtype=config.model.dtype,
        policy_parameters=sum(p.numel() for p in run.policy.parameters()),
        trained_parameters=sum(p.numel() for p in run.policy.parameters() if p.requires_grad),
        prompts=len(run.prompts),
        longest_prompt=run.prompts.longest,
        responses=run.config.rollout.batch_size,
        prompt_tokens=max(len(p.ids) for p in prompts),
        response_tokens=first["tokens/response_len_mean"],
        ratio=ratio,
        kl=first["objective/kl"],
        score=first["objective/scores"],
        sources={
            name.removeprefix("reward/"): value
            for name, value in first.items()
            if name.startswith("reward/")
        },
        step_seconds=second[STEP_TIME],
        phases={name: second[phase_time(name)] for name in PHASES if phase_time(name) in second},
        memory=max(first[PEAK_MEMORY], second[PEAK_MEMORY]),
        planned_memory=None if planned is None else planned.metric / 1e9,
        warnings=warnings,
        samples=[CheckedSample(s.prompt, s.response, s.score) for s in samples[:PROMPTS]],
    )


def _report(_step: int, _phase: str, *_progress: int) -> ReportProgress:
    return lambda _done, _total: None


if __name__ == "__main__":
    main()
